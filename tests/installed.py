"""The installed transformers, whose traces and runs the tests compare with plans for just that version."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

from memplan.job.spec import Job
from memplan.tape.behaviour import Behaviour

FIELDS = (
    "rotary_product",
    "remap_positions",
    "checks_all_rows",
    "expert_masks",
    "expert_deltas",
    "divides_tokens",
    "sums_masks",
    "torch",
    "checkpoints_forward",
)
"""Of `Behaviour`: what differs between the versions that a trace runs on."""


def installed_transformers() -> tuple[int, int]:
    """(major, minor)"""
    major, minor = version("transformers").split(".")[:2]
    return int(major), int(minor)


def traces_every_block(family: str, job: Job) -> bool:
    """
    Whether blocks are unlike each other: the thread that runs backward takes cuBLASLt's workspace in the first block
    that is recomputed, which has products with a bias; only torch before 2.12 keeps one (CublasHandlePool.cpp).
    """
    recomputes = job.activation_checkpointing != "none"
    return family == "gpt2" and recomputes and installed_behaviour(job).cublaslt_workspace_bytes > 0


def installed_behaviour(job: Job) -> Behaviour:
    """What the shape writer plans for by itself are the newest versions."""
    versions = {package: version(package) for package in ("torch", "transformers", "peft")}
    named = Behaviour.for_software(job, versions, family="llama")
    return replace(Behaviour.for_job(job), **{field: getattr(named, field) for field in FIELDS})
