"""Records of tiny jobs: measured on the CPU, and through the CUDA layer on a double."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from cuda_double import CONTEXT_BYTES, TOTAL_BYTES, CudaDouble, cuda_device, flattened  # noqa: E402
from tiny_records import LLAMA, begin  # noqa: E402

from memplan.record.analyse import (  # noqa: E402
    context_bytes,
    different_allocations,
    different_at_peaks,
    predict,
    replay_measured,
)
from memplan.record.compact import decode, encode  # noqa: E402
from memplan.record.device import CpuDevice  # noqa: E402
from memplan.record.file import RecordFile  # noqa: E402
from memplan.record.launch import add_prediction  # noqa: E402
from memplan.record.phases import tape_phases  # noqa: E402
from memplan.record.worker import measure  # noqa: E402
from memplan.tape.tape import FlatTape, Mark, Storage, Tape  # noqa: E402

pytestmark = pytest.mark.torch


def errors(record: RecordFile) -> dict[tuple[str, str | None, int | None], float]:
    """Every line of the comparison."""
    lines = record.fields["comparison"]
    return {(line["statistic"], line["phase"], line["step"]): line["error"] for line in lines}


@pytest.mark.parametrize("loop", ["memplan", "script", "hf_trainer"])
def test_a_job_on_the_cpu(loop: str, tmp_path: Path) -> None:
    """Each loop runs, and what it allocated is what the plan says, to half a percent; the file says it all."""
    pytest.importorskip("accelerate")
    record = begin(tmp_path, loop=loop, gradient_accumulation_steps=2)

    assert measure(record, CpuDevice) == 0
    add_prediction(record)

    written = RecordFile.read(record.path).fields
    assert (written["outcome"], written["error"], written["trace_error"]) == ("completed", None, None)
    assert written["device"]["type"] == "cpu"
    assert [(phase["phase"], phase["step"]) for phase in written["phases"][:4]] == [
        ("load", 0), ("forward", 1), ("backward", 1), ("forward", 1),
    ]  # fmt: skip
    found = errors(record)
    assert abs(found["allocated", None, None]) < 0.005
    assert {("allocated", "backward", 2), ("allocated", "optimizer_step", 2)} <= found.keys()
    trace = decode(written["trace"])
    assert tape_phases(trace) == written["phases"]
    assert any(
        "AddmmBackward0" in storage.where or "MmBackward0" in storage.where for storage in trace.storages
    )


def test_a_sharded_model_on_one_rank(tmp_path: Path) -> None:
    """FSDP2 over a group of one: what it gathers and lets go of shows in its events."""
    record = begin(tmp_path, steps=1, parallel__strategy="FULL_SHARD")

    assert measure(record, CpuDevice) == 0

    names = {storage.where for storage in decode(record.fields["trace"]).storages}
    assert any("FSDP" in name or "fsdp" in name for name in names)


def test_a_job_through_the_cuda_layer(tmp_path: Path) -> None:
    """An allocator that does what was planned is recorded without any error, bytes outside it included."""
    record = begin(tmp_path)
    job = record.job.replace(gpu="NVIDIA H200")
    flat = flattened(job, record)
    double = CudaDouble(flat, job.allocator)

    assert measure(record, lambda: cuda_device(double)) == 0
    add_prediction(record)

    fields = record.fields
    assert fields["device"]["compute_capability"] == [9, 0]
    assert fields["trace_error"] is None
    assert context_bytes(record) == CONTEXT_BYTES
    found = errors(record)
    assert {("reserved", "backward", 2), ("device", None, None)} <= found.keys()
    assert {0.0} == {error for (statistic, *_), error in found.items() if statistic != "device"}
    assert {line.error for line in replay_measured(record)} == {0.0}
    prediction = predict(record)
    assert {} == different_allocations(record, prediction, min_bytes=0)
    assert {} == different_at_peaks(record, prediction, min_bytes=0)
    assert double.metadata[:2] == ["load", "forward of step 1"]
    assert decode(fields["trace"]).storages[5].where.startswith("op6")


def test_what_was_not_planned_is_named(tmp_path: Path) -> None:
    """An allocation that the plan lacks is found by phase and size, with the operation that made it."""
    record = begin(tmp_path)
    job = record.job.replace(gpu="NVIDIA H200")
    double = CudaDouble(with_extra(flattened(job, record), "backward", 1 << 20), job.allocator)

    measure(record, lambda: cuda_device(double))

    prediction = predict(record)
    for differences in (
        different_allocations(record, prediction, min_bytes=0),
        different_at_peaks(record, prediction, min_bytes=0),
    ):
        (found,) = differences["backward", 2]
        assert (found.num_bytes, found.count) == (1 << 20, 1)
        assert "surprise" in found.where[0]
    assert len(different_allocations(record, prediction, min_bytes=2 << 20)) == 0


def with_extra(flat: FlatTape, phase: str, num_bytes: int) -> FlatTape:
    """The tape with one more storage in every such phase, alive from its beginning to its end."""
    tape = flat.tape
    sizes, storages, events, marks = list(tape.sizes), list(flat.storages), [], []
    bounds = [*(mark.event for mark in tape.marks), len(tape.events)]
    for mark, start, stop in zip(tape.marks, bounds, bounds[1:]):
        marks.append(mark._replace(event=len(events)))
        extra = mark.phase == phase
        if extra:
            sizes.append(num_bytes)
            storages.append(Storage(num_bytes, "workspace", "surprise", None, None))
            events.append(len(storages))
        events += tape.events[start:stop]
        if extra:
            events.append(-len(storages))
    return FlatTape(Tape(events, sizes, marks, tape.streams), storages)


def test_running_out_of_memory_is_an_outcome(tmp_path: Path) -> None:
    """The phase, what was asked for, and everything measured until then."""
    record = begin(tmp_path)
    double = CudaDouble(flattened(record.job, record), record.job.allocator, fails_in=2)

    assert measure(record, lambda: cuda_device(double, limit_bytes=TOTAL_BYTES // 2)) == 1

    fields = RecordFile.read(record.path).fields
    assert fields["outcome"] == "out_of_memory"
    assert "tried to allocate 20.00 MiB more" in fields["error"]
    assert [phase["phase"] for phase in fields["phases"]][:2] == ["load", "forward"]
    assert double.fraction == 0.5


@pytest.mark.parametrize(
    ("changes", "outcome", "words"),
    [
        ({"optimizer": "adamw_8bit"}, "refused", "runs on CUDA only"),
        ({"loop": "script", "loss": "chunked"}, "refused", "loop=memplan"),
        ({"parallel__dp_shard": 2, "parallel__strategy": "FULL_SHARD"}, "refused", "needs 2 GPUs"),
        ({"loop": "hf_trainer", "optimizer": "adafactor"}, "refused", "has no `optimizer: adafactor`"),
    ],
)
def test_what_cannot_run_is_an_outcome(
    changes: dict[str, Any], outcome: str, words: str, tmp_path: Path
) -> None:
    """The record says why, in a sentence."""
    record = begin(tmp_path, **changes)

    assert measure(record, CpuDevice) == 2

    fields = json.loads(record.path.read_text())
    assert fields["outcome"] == outcome
    assert words in fields["error"]


def test_faults_and_missing_libraries_are_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's exception keeps its last lines, without folders; one that is missing is named."""
    from memplan.record import worker

    def fail(error: Exception) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            raise error

        return run

    record = begin(tmp_path)
    monkeypatch.setattr(worker, "run_steps", fail(KeyError("odd")))
    assert measure(record, CpuDevice) == 2
    assert record.fields["outcome"] == "failed"
    assert "KeyError" in record.fields["error"]
    assert all("/" not in line.split()[0] for line in record.fields["traceback"])

    monkeypatch.setattr(worker, "run_steps", fail(ImportError("No module named 'bitsandbytes'")))
    assert measure(begin(tmp_path), CpuDevice) == 2
    assert RecordFile.read(record.path).fields["outcome"] == "missing_library"


def test_models_without_a_program_are_recorded_too(tmp_path: Path) -> None:
    """The measurement stands alone and says why, or the trace of the real step stands beside it."""
    config = {**LLAMA, "model_type": "stablelm", "architectures": ["StableLmForCausalLM"]}
    record = begin(tmp_path, config=config, steps=1, method="full")

    assert measure(record, CpuDevice) == 0
    add_prediction(record)
    assert (record.fields["plan"], record.fields["comparison"]) == (None, [])
    assert "StableLm" in record.fields["plan_error"]
    assert record.fields["phases"][0]["allocated_peak_bytes"] > 0

    add_prediction(record, engine="auto")
    assert record.fields["plan"]["engine"] == "trace"
    assert abs(errors(record)["allocated", None, None]) < 0.01


def test_events_survive_compaction() -> None:
    """Sizes, order, lifetimes, streams, marks and names come back; ids are numbered anew."""
    storages = [Storage(8, "weights", "w", "float32", (2,)), Storage(4, "activations", "a", None, None)]
    flat = FlatTape(
        Tape([2, 1, -2, -1], [0, 8, 4], [Mark(0, "load", 0), Mark(2, "end", 1)], {1: 7}), storages
    )

    back = decode(encode(flat))

    assert back.tape.events == [1, 2, -1, -2]
    assert back.tape.sizes == [0, 4, 8]
    assert back.tape.streams == {2: 7}
    assert back.tape.marks == flat.tape.marks
    assert back.storages == [storages[1], storages[0]]
    with pytest.raises(ValueError, match="cannot be read"):
        decode({**encode(flat), "data": "AAAA"})
