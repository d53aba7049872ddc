"""
Both engines on drawn jobs of real models. `python -m benchmarks.engines [--jobs 100] [--seed 1]`

Draws jobs over the catalogue's models, true in width and depth, plans each with the shape writer and with the trace of
the real step, and prints those whose peak, reserved bytes or need differ. What an engine refuses is drawn again. The
tests do the same with tiny models, where small tensors weigh more and many fewer sizes occur.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from memplan.allocator import replay_with_need
from memplan.errors import MemplanError
from memplan.job.load import load_job
from memplan.job.spec import Job
from memplan.model import architecture_from_config
from memplan.model.catalogue import CatalogueEntry, list_models
from memplan.tape.tape import WrittenTape
from memplan.tape.writer import write_tape
from memplan.tracing.writer import trace_job

CHOICES: dict[str, tuple[Any, ...]] = {
    "method": ("full", "lora", "qlora"),
    "dtype": ("bfloat16", "float16", "float32"),
    "autocast": (None, "bfloat16"),
    "attention": ("sdpa", "eager", "flash_attention_2"),
    "activation_checkpointing": ("none", "selective", "full"),
    "activation_offload": (False, True),
    "loss": ("full", "chunked", "fused"),
    "loop": ("memplan", "hf_trainer", "script"),
    "optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
    "optimizer_kernel": ("foreach", "fused"),
    "packing": (False, True),
    "gradient_accumulation_steps": (1, 2, 8),
    "train.max_grad_norm": (None, 1.0),
    "lora.dropout": (0.0, 0.05),
    "micro_batch_size": (1, 2, 4, 8),
    "max_seq_len": (512, 1000, 2048, 4096, 8192),
    "gpu": ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "Tesla T4", "NVIDIA GeForce RTX 4090"),
    "parallel": (
        "{}", "{dp_replicate: 2}", "{strategy: FULL_SHARD, dp_shard: 4}", "{strategy: SHARD_GRAD_OP, dp_shard: 2}",
        "{strategy: HYBRID_SHARD, dp_shard: 2, dp_replicate: 2}",
    ),
    "offload.params": (False, True),
}  # fmt: skip
BEYOND = 0.005


def main() -> None:
    """Draw, compare, and print every job that is not equal in all three."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--jobs", type=int, default=100, help="how many to compare (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="of the draw (default: 1)")
    arguments = parser.parse_args()
    drawn = random.Random(arguments.seed)
    models = [entry for entry in list_models() if entry.supported]
    equal = beyond = compared = 0
    while compared < arguments.jobs:
        entry, fields = drawn.choice(models), draw_fields(drawn)
        try:
            ours, theirs = both(entry, _job(entry, fields))
        except MemplanError:  # the job is not in order, or one of the engines refuses it
            continue
        compared += 1
        if ours == theirs:
            equal += 1
            continue
        errors = [our / their - 1 for our, their in zip(ours, theirs, strict=True)]
        beyond += abs(errors[0]) > BEYOND
        named = ", ".join(
            f"{name} {error:+.2%}"
            for name, error in zip(("allocated", "reserved", "need"), errors, strict=True)
        )
        print(f"{entry.name}: {named}; {fields}", flush=True)
    print(f"{compared} jobs: {equal} equal to the byte, {beyond} peaks more than {BEYOND:.1%} apart")


def draw_fields(drawn: random.Random) -> dict[str, Any]:
    """Four to seven fields of a job, the others as they are by default."""
    names = drawn.sample(list(CHOICES), drawn.randint(4, 7))
    return {"method": "lora", "max_seq_len": 2048} | {name: drawn.choice(CHOICES[name]) for name in names}


def _job(entry: CatalogueEntry, fields: dict[str, Any]) -> Job:
    settings = {
        "model": entry.name,
        **{name: "null" if value is None else value for name, value in fields.items()},
    }
    return load_job(None, [f"{name}={value}" for name, value in settings.items()]).job


def both(entry: CatalogueEntry, job: Job) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """
    (allocated, reserved, need) by the shape writer and by the trace.

    Raises:
        MemplanError: one of them refuses the job.
    """
    architecture = architecture_from_config(entry.config, name=entry.name, source=entry.source)
    return (
        _memory(write_tape(job, architecture, device="cuda"), job),
        _memory(trace_job(job, entry.config, device="cuda"), job),
    )


def _memory(written: WrittenTape, job: Job) -> tuple[int, int, int]:
    tape = written.flatten()
    result, need_bytes = replay_with_need(tape.events, tape.sizes, tape.streams, job.allocator)
    return result.peak_allocated_bytes, result.peak_reserved_bytes, need_bytes


if __name__ == "__main__":
    main()
