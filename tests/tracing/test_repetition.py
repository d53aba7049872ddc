"""A few traced blocks, repeated, are the trace of every block: event by event, and what each free frees."""

from __future__ import annotations

from dataclasses import replace

import pytest

from installed import traces_every_block
from memplan.tape.tape import Tape
from memplan.tracing.writer import trace_job
from tracing.tiny import CONFIGS, job

JOBS = {
    "full": {},
    "full, checkpointed, foreach": {"activation_checkpointing": "full", "optimizer_kernel": "foreach"},
    "full, loop, accumulated": {"optimizer_kernel": "loop", "gradient_accumulation_steps": 4},
    "full, every second block": {"activation_checkpointing": "selective"},
    "lora": {"method": "lora"},
    "lora, checkpointed, dropout": {
        "method": "lora",
        "activation_checkpointing": "full",
        "lora__dropout": 0.1,
    },
    "lora, eager, autocast": {"method": "lora", "attention": "eager", "autocast": "bfloat16"},
    "lora, chunked": {"method": "lora", "loss": "chunked"},
    "lora, script": {"method": "lora", "loop": "script"},
    "full, checkpointed, autocast": {
        "activation_checkpointing": "full",
        "dtype": "float32",
        "autocast": "bfloat16",
    },
    "lora, clipped": {"method": "lora", "train__max_grad_norm": 1.0},
    "full, Trainer": {"loop": "hf_trainer", "optimizer_kernel": "foreach"},
    "lora, checkpointed, Trainer": {
        "method": "lora",
        "loop": "hf_trainer",
        "activation_checkpointing": "full",
        "autocast": "bfloat16",
    },
    "npt": {"method": "npt", "npt__rank": 4},
}


def in_blocks(tape: Tape) -> Tape:
    """In the allocator's blocks of 512 bytes: lists of a scalar per block differ in bytes, and nothing else does."""
    return replace(tape, sizes=[-(-size // 512) for size in tape.sizes])


@pytest.mark.parametrize("settings", JOBS.values(), ids=JOBS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_repeating_blocks_is_tracing_them_all(family: str, settings: dict[str, object]) -> None:
    config = CONFIGS[family] | ({"n_layer": 12} if family == "gpt2" else {"num_hidden_layers": 12})
    few, every = (trace_job(job(**settings), config, whole=whole) for whole in (False, True))
    assert in_blocks(few.flatten()) == in_blocks(every.flatten())
    assert (len(few.expansion.layers) == 12) == traces_every_block(family, job(**settings))
    assert [few.describe(index).where for index in range(1, 200)] == [
        every.describe(index).where for index in range(1, 200)
    ]
    assert few.parameters == every.parameters
