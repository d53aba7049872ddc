"""Peaks per phase on the CPU, against counts made by hand."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from memplan.train import gloo  # noqa: E402
from memplan.train.measure import CpuMeter, Event, replay, resident_bytes, storage_bytes  # noqa: E402
from memplan.train.record import PhasePeak, highest_by_phase  # noqa: E402

pytestmark = pytest.mark.torch


def mark(time: int, phase: str, step: int) -> Event:
    return Event(time, f"memplan/{phase}/{step}")


def block(time: int, address: int, num_bytes: int) -> Event:
    """Allocated, or freed if `num_bytes` is negative."""
    return Event(time, "[memory]", address, num_bytes)


def test_events_are_split_at_the_marks() -> None:
    """A phase's peak counts what is alive when it begins; time decides; accumulation is merged; saving is left out."""
    events = [
        mark(10, "load", 0), block(11, 1000, 100), mark(20, "forward", 1),
        block(22, 2000, -50), block(21, 2000, 50), mark(30, "backward", 1), block(31, 3000, 7), block(32, 3000, -7),
        mark(40, "forward", 1), block(41, 2000, 60), mark(50, "optimizer_step", 1), mark(60, "between", 1),
        block(61, 4000, 500), block(62, 4000, -500), mark(70, "forward", 2),
    ]  # fmt: skip

    expected = {"load": 100, "forward": 160, "backward": 107, "optimizer_step": 160}
    first, second = replay(events)[:4], replay(events)[4:]
    assert {peak.phase: peak.allocated_peak_bytes for peak in first} == expected
    assert second == [PhasePeak("forward", 2, 160)]


@pytest.mark.parametrize(
    ("address", "num_bytes", "expected"),
    [
        (1000, 100, 120), (1000, 40, 60), (990, 15, 35), (1099, 50, 70), (900, 800, 800),  # where the block was
        (980, 20, 140), (1100, 5, 125),  # beside it
    ],
)  # fmt: skip
def test_a_block_whose_memory_is_given_out_again_was_freed(
    address: int, num_bytes: int, expected: int
) -> None:
    """Nobody saw 100 bytes at 1000 being freed. At 1500 are 20 more, which stay."""
    events = [
        mark(1, "forward", 1), block(2, 1000, 100), block(3, 1500, 20), mark(4, "backward", 1),
        block(5, address, num_bytes), mark(6, "end", 1), block(7, 1500, -20), block(8, 1500, -20),
        block(9, address, -num_bytes), mark(10, "after", 1),
    ]  # fmt: skip

    peaks = {peak.phase: peak.allocated_peak_bytes for peak in replay(events)}

    still_there = 100 if address + num_bytes <= 1000 or address >= 1100 else 0
    assert peaks["end"] == expected
    assert peaks["after"] == still_there


def test_what_another_thread_frees_is_counted_until_it_is_replaced() -> None:
    """The profiler does not see a block go; that another lies where it was tells."""
    num_bytes = 1 << 20
    counted: list[int] = []
    most = 0
    meter = CpuMeter(steps=1)
    meter.begin("forward", 1)
    for _ in range(8):
        held = [torch.empty(num_bytes, dtype=torch.uint8)]
        address = held[0].data_ptr()
        counted = [other for other in counted if abs(other - address) >= num_bytes] + [address]
        most = max(most, len(counted))
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
    meter.end_step(1)

    assert meter.peaks()[0].allocated_peak_bytes == most * num_bytes


@pytest.mark.parametrize("waits_for", ["work", "tensor"])
def test_who_waits_for_a_collective_waits_for_gloos_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits_for: str
) -> None:
    """Until the thread sleeps, and only inside; other threads may run. DTensor waits for tensors."""
    from torch.distributed import _functional_collectives

    def collect() -> None:
        if waits_for == "work":
            torch.distributed.all_reduce(torch.ones(4))
        else:
            _functional_collectives.wait_tensor(torch.ones(4))

    states = iter(["R", "D", "S"])

    class Task:
        def __init__(self, name: str) -> None:
            self.name = name

        def __truediv__(self, _: str) -> Task:
            return self

        def read_text(self) -> str:
            return f"12 ({self.name}) {'R' if self.name == 'other' else next(states)} 1 2"

    class Tasks:
        def is_dir(self) -> bool:
            return True

        def iterdir(self) -> list[Task]:
            return [Task("pt_gloo_runloop"), Task("other")]

    monkeypatch.setattr(gloo, "_TASKS", Tasks())
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with gloo.settled_collectives():
            collect()
        collect()
    finally:
        torch.distributed.destroy_process_group()

    assert next(states, None) is None


def test_weights_that_the_allocator_never_saw_are_added() -> None:
    """Weights mapped from a file count in loading and in every later phase, but not twice."""
    events = [
        mark(1, "load", 0), block(2, 1000, 30), mark(3, "adopted", 0), mark(4, "forward", 1), block(5, 2000, 5),
    ]  # fmt: skip

    def peaks(model_bytes: int) -> list[int]:
        return [peak.allocated_peak_bytes for peak in replay(events, model_bytes=model_bytes)]

    assert peaks(model_bytes=100) == [100, 105]
    assert peaks(model_bytes=20) == [30, 35]


def test_a_mapped_file_is_no_allocation(tmp_path: Path) -> None:
    """What safetensors maps is the page cache's; only the copy of a tensor counts."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file(
        {"a": torch.zeros(1000, dtype=torch.uint8), "b": torch.zeros(1 << 20)}, tmp_path / "w.safetensors"
    )
    meter = CpuMeter(steps=1)
    meter.begin("load", 0)
    with safe_open(tmp_path / "w.safetensors", framework="pt") as tensors:
        copy = tensors.get_tensor("a").clone()
    meter.end_step(1)

    assert meter.peaks()[0].allocated_peak_bytes == copy.nbytes
    assert "from_file" not in vars(torch.UntypedStorage)


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
