"""Records of jobs small enough for a test."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from memplan.job.spec import Job, Lora
from memplan.record.file import RecordFile

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip


def begin(path: Path, *, steps: int = 2, config: dict[str, Any] = LLAMA, **changes: Any) -> RecordFile:
    """The record of a tiny job; changes as in `Job.replace`, with `__` for the dot."""
    job = Job(
        model="tiny", weights="random", dtype="float32", micro_batch_size=2, max_seq_len=64, attention="eager",
        lora=Lora(rank=4, alpha=8),
    ).replace(**{name.replace("__", "."): value for name, value in changes.items()})  # fmt: skip
    return RecordFile.create(path / "record.json", dataclasses.asdict(job), config, steps=steps)
