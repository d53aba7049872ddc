"""Runs that tell one mechanism of a run from another: peft's sum, dropout's mask."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks.compare import Run
from benchmarks.published import Case, Measurement, load_published
from benchmarks.replicas import REPLICAS

from memplan.units import MiB

CASES = load_published()


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.id == name)


def test_replicas_under_fsdp1_depend_on_how_peft_adds():
    """Of the two that are planned too low the second is right with peft before 0.9; the first is as it was."""
    errors = []
    for name in REPLICAS:
        case = case_named(name)
        in_place = dataclasses.replace(case.behaviour, adds_in_place=True)
        predicted = Run(case, in_place).predict("reserved")
        assert predicted is not None
        errors.append(predicted / case.measured.bytes - 1)

    assert [-0.0071, 0.0002] == pytest.approx(errors, abs=5e-5)


def test_the_mask_of_dropout_comes_before_its_output():
    """
    Both 4.48 runs that agree to the MiB on what is outside torch's allocator: plain LoRA, and with the Triton loss at
    twice the batch, which with the mask behind the output would differ by the mask of a block's input, 128 MiB.
    """
    plain, fused = (
        case_named(f"fms-main-mistral-7b-v0.1-{name}")
        for name in ("none-lora-g1-bs4", "foak-fast-kernels-lora-g1-bs4")
    )
    fields = {**fused.fields, "micro_batch_size": 8}
    published = Measurement("device", 41698 * MiB, "41698 MiB")  # a100_80gb.csv row 40
    twice = dataclasses.replace(fused, fields=fields, measured=published, also_measured=())

    outside = Run(plain, plain.behaviour).outside_bytes()
    assert 1690 * MiB == outside == Run(twice, twice.behaviour).outside_bytes()
