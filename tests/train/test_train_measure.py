"""Peaks per phase on the CPU, against counts made by hand."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memplan.train.measure import CpuMeter, replay, resident_bytes, storage_bytes  # noqa: E402
from memplan.train.record import PhasePeak, highest_by_phase  # noqa: E402

pytestmark = pytest.mark.torch

MEMORY = "[memory]"


def test_events_are_split_at_the_marks() -> None:
    """A phase's peak counts what is alive when it begins; time decides; accumulation is merged."""
    events = [
        (10, "memplan/load/0", 0), (11, MEMORY, 100), (12, "aten::empty", 0), (20, "memplan/forward/1", 0),
        (22, MEMORY, -50), (21, MEMORY, 50), (30, "memplan/backward/1", 0), (31, MEMORY, 7), (32, MEMORY, -7),
        (40, "memplan/forward/1", 0), (41, MEMORY, 60), (50, "memplan/optimizer_step/1", 0),
    ]  # fmt: skip

    expected = {"load": 100, "forward": 160, "backward": 107, "optimizer_step": 160}
    assert {peak.phase: peak.allocated_peak_bytes for peak in replay(events)} == expected


def test_weights_that_the_allocator_never_saw_are_added() -> None:
    """Weights mapped from a file count in loading and in every later phase, but not twice."""
    events = [
        (1, "memplan/load/0", 0), (2, MEMORY, 30), (3, "memplan/adopt/0", 0), (4, "memplan/forward/1", 0),
        (5, MEMORY, 5),
    ]  # fmt: skip

    def peaks(model_bytes: int) -> list[int]:
        return [peak.allocated_peak_bytes for peak in replay(events, model_bytes=model_bytes)]

    assert peaks(model_bytes=100) == [100, 105]
    assert peaks(model_bytes=20) == [30, 35]


def test_a_step_counted_by_hand() -> None:
    """y = (x w).square().sum() of 64 x 64 floats: every tensor of forward, backward and SGD, to the byte."""
    matrix, scalar = 64 * 64 * 4, 4
    meter = CpuMeter(steps=1)
    meter.begin("load", 0)
    module = torch.nn.Linear(64, 64, bias=False)
    x = torch.ones(64, 64)
    meter.adopt(module)
    meter.begin("forward", 1)
    loss = (x @ module.weight).square().sum()  # product, square; the square is freed after the sum
    meter.begin("backward", 1)
    loss.backward()
    meter.begin("optimizer_step", 1)
    with torch.no_grad():
        module.weight.sub_(module.weight.grad, alpha=0.1)
    module.weight.grad = None
    meter.end_step(1)

    peaks = {peak.phase: peak.allocated_peak_bytes for peak in meter.peaks()}

    assert peaks["load"] == 2 * matrix
    assert peaks["forward"] == 4 * matrix + scalar
    # weight, x, product, the gradient of the square and of the product, or that of the weight
    assert 5 * matrix <= peaks["backward"] <= 6 * matrix + 64
    assert peaks["optimizer_step"] == 3 * matrix + scalar


def test_profiling_stops_after_its_steps() -> None:
    """What comes later is not recorded, and the peaks are known from then on."""
    meter = CpuMeter(steps=1)
    meter.begin("forward", 1)
    meter.end_step(1)
    known = meter.peak_bytes()
    meter.begin("forward", 2)
    tensor = torch.ones(1 << 16)
    meter.end_step(2)

    assert known is not None
    assert meter.peak_bytes() == known < tensor.nbytes
    assert meter.live_bytes() > 0


def test_storages_count_once() -> None:
    """Tied weights and views are one storage."""
    tensor = torch.zeros(10, 10)

    assert storage_bytes([tensor, tensor.t(), tensor[3]]) == 400
    assert resident_bytes() > 400


def test_the_worst_step_speaks_for_its_phase() -> None:
    """The highest peak of each phase, phases in order of appearance."""
    peaks = [
        PhasePeak("load", 0, 5),
        PhasePeak("forward", 1, 7),
        PhasePeak("forward", 2, 9),
        PhasePeak("forward", 3, 8),
    ]

    assert highest_by_phase(peaks) == {"load": peaks[0], "forward": peaks[2]}
