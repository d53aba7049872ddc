"""The installed transformers, whose traces and runs the tests compare with plans for just that version."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

from memplan.job.spec import Job
from memplan.tape.behaviour import Behaviour

MASKED_EXPERTS_BEFORE = (5, 18)
"""Until then transformers masks rows of experts also where none are on other ranks (integrations/moe.py)."""


def installed_transformers() -> tuple[int, int]:
    """(major, minor)"""
    return _installed("transformers")


def tolerance_of_experts(job: Job) -> float | None:
    """
    How far the programs' peak may be from the trace's where the installed versions run Mixtral's experts otherwise,
    relative; None where every event is the same. peft before 0.21 multiplies the adapters of experts in float32 and
    adds the result to the weights; since then it is one product in the weights' dtype (tuners/lora/layer.py).
    """
    if job.method == "lora" and _installed("peft") < (0, 21):
        return 0.03
    return 0.0005 if installed_transformers() < MASKED_EXPERTS_BEFORE else None


def _installed(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


def installed_behaviour(job: Job) -> Behaviour:
    """What the shape writer plans for by itself is the newest transformers."""
    named = Behaviour.for_software(job, {"transformers": version("transformers")}, family="llama")
    return replace(
        Behaviour.for_job(job),
        rotary_product=named.rotary_product,
        remap_positions=named.remap_positions,
        checkpoints_forward=named.checkpoints_forward,
    )
