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
    major, minor = version("transformers").split(".")[:2]
    return int(major), int(minor)


def installed_behaviour(job: Job) -> Behaviour:
    """What the shape writer plans for by itself is the newest transformers."""
    named = Behaviour.for_software(job, {"transformers": version("transformers")}, family="llama")
    return replace(
        Behaviour.for_job(job), rotary_product=named.rotary_product, remap_positions=named.remap_positions
    )
