"""The matrix, the probes and the analysis, on the CPU with tiny jobs and through the double."""

from __future__ import annotations

import json
import zipfile
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from benchmarks.bands import error_bands  # noqa: E402
from benchmarks.compare import RECORDED, compare, compare_need  # noqa: E402
from benchmarks.record.__main__ import LOADING_WAYS  # noqa: E402
from benchmarks.record.analysis import analyse  # noqa: E402
from benchmarks.record.loading import WAYS, load_and_record, save_model  # noqa: E402
from benchmarks.record.matrix import cut, load_matrix  # noqa: E402
from benchmarks.record.operations import SMALL, Case, cases, choices  # noqa: E402
from benchmarks.record.probes import CpuWatch, CudaWatch, Probes, run_case  # noqa: E402
from benchmarks.record.runner import Clock, run_matrix  # noqa: E402
from benchmarks.recorded import load_recorded  # noqa: E402
from cuda_double import CONTEXT_BYTES, CudaDouble, cuda_device, flattened  # noqa: E402
from tiny_records import LLAMA, begin  # noqa: E402

from memplan.record.device import CpuDevice  # noqa: E402
from memplan.record.file import RecordFile  # noqa: E402
from memplan.record.launch import add_prediction  # noqa: E402
from memplan.record.worker import measure  # noqa: E402
from memplan.units import MiB  # noqa: E402

pytestmark = pytest.mark.torch

MATRIX = {
    "defaults": {"dtype": "float32", "max_seq_len": 32, "attention": "eager", "steps": 1},
    "models": {"tiny": {"config": LLAMA, "layers": 1}},
    "cells": {"first": {"model": "tiny"}, "second": {"model": "tiny", "optimizer": "adamw_8bit"}},
}


class InProcess:
    """Stands in for a measuring process: what one does, here, on the CPU."""

    def __init__(self, record: RecordFile) -> None:
        self.record = record

    def go(self) -> None:
        measure(self.record, CpuDevice)

    def finish(self, seconds: float) -> RecordFile:
        return RecordFile.read(self.record.path)

    def discard(self) -> None:
        raise AssertionError("nothing is left to discard")


def test_the_matrix_can_be_read() -> None:
    """Every cell is a job without a mistake, on a model that is known, with names that can be files."""
    cells = load_matrix()

    assert len({cell.name for cell in cells}) == len(cells) > 40
    assert all(cell.name.replace(".", "").replace("-", "").isalnum() for cell in cells)
    assert {cell.loaded.job.method for cell in cells} == {"full", "lora", "qlora", "npt"}
    assert {cell.loaded.job.loop for cell in cells} == {"memplan", "script", "hf_trainer"}


def test_a_model_is_cut_to_its_first_layers() -> None:
    """The number of layers and what is listed for each of them; there is no cutting to more."""
    config = {"n_layer": 3, "layer_types": ["a", "b", "c"], "n_embd": 8}

    assert cut(config, 2) == {"n_layer": 2, "layer_types": ["a", "b"], "n_embd": 8}
    with pytest.raises(ValueError, match="3 layers"):
        cut(config, 4)


def test_the_matrix_runs_and_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    """A line and a record for each cell, refusals included; a second call finds nothing left to do."""
    matrix, folder, archive = tmp_path / "matrix.yaml", tmp_path / "out", tmp_path / "all.zip"
    matrix.write_text(yaml.safe_dump(MATRIX))
    lines: list[str] = []

    def run(**options: Any) -> int:
        cells = load_matrix(matrix)
        return run_matrix(cells, folder, Clock(inf), say=lines.append, start=InProcess, **options)

    count, again = run(archive=archive), run(resume=True)

    assert (count, again) == (2, 0)
    outcomes = {path.stem: RecordFile.read(path).fields["outcome"] for path in folder.glob("*.json")}
    assert outcomes == {"first": "completed", "second": "refused"}
    assert RecordFile.read(folder / "first.json").fields["model_config"]["num_hidden_layers"] == 1
    assert any(line.startswith("first") and "%" in line for line in lines)
    assert sorted(zipfile.ZipFile(archive).namelist()) == ["first.json", "second.json"]
    text = "\n".join(analyse(folder))
    assert "refused" in text
    assert "first" in text.partition("# Predicted / measured - 1")[2]


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    """The process that waited is ended, and its empty record is gone."""
    matrix, lines = tmp_path / "matrix.yaml", []
    matrix.write_text(yaml.safe_dump(MATRIX))

    assert run_matrix(load_matrix(matrix), tmp_path / "out", Clock(1), say=lines.append) == 0

    assert any("no time left for 2 cells" in line for line in lines)
    assert list((tmp_path / "out").glob("*.json")) == []


def test_probes_of_every_operation(tmp_path: Path) -> None:
    """All kinds of operations are asked about; the events of a matrix product are those that anyone can count."""
    probes = Probes(tmp_path / "probes.json", CpuWatch(), seconds=inf)
    wanted = [
        case
        for case in cases(torch.device("cpu"), SMALL)
        if case.group not in ("linear_4bit", "dequantize_4bit")
    ]

    probes.run(wanted, lambda group: None)

    found = json.loads((tmp_path / "probes.json").read_text())["cases"]
    assert [case["group"] for case in found] == [case.group for case in wanted]
    linear = next(case for case in found if case["group"] == "linear")
    rows, width = SMALL.token_counts[0], SMALL.width
    assert linear["forward"] == {
        "events": [4 * rows * width], "peak_bytes": 4 * rows * width, "kept_bytes": 4 * rows * width,
    }  # fmt: skip
    assert sorted(linear["backward"]["events"]) == sorted([4 * rows * width, 4 * width * width])
    math = next(case for case in found if case["shape"].get("backend") == "MATH")
    assert math["forward"]["peak_bytes"] > math["forward"]["kept_bytes"] > 0
    assert {"chosen"} <= next(choices(torch.device("cpu"), SMALL)).keys()


def test_a_probe_that_ends_its_process_is_passed_over(tmp_path: Path) -> None:
    """It is in the file before it runs, so the next process begins behind it."""
    path = tmp_path / "probes.json"

    class Ended(BaseException):
        pass

    def make(error: type[BaseException] | None) -> Any:
        def run() -> None:
            if error is not None:
                raise error

        return lambda: run

    questions = [Case("a", {}, make(None)), Case("b", {}, make(Ended)), Case("c", {}, make(ValueError))]
    with pytest.raises(Ended):
        Probes(path, CpuWatch(), seconds=inf).run(questions, lambda group: None)
    Probes(path, CpuWatch(), seconds=inf, resume=True).run(questions, lambda group: None)

    found = json.loads(path.read_text())["cases"]
    assert ["forward" in case for case in found] == [True, False, False]
    assert [case.get("error") for case in found] == [None, "the process ended here", "ValueError: "]


def test_what_an_operation_allocates_on_cuda() -> None:
    """From the history: requests and completed frees of this operation alone, segments left out."""
    history = [{"action": "alloc", "size": 7}]
    added = [
        {"action": "segment_alloc", "size": 2 * MiB}, {"action": "alloc", "size": 100},
        {"action": "alloc", "size": 30}, {"action": "free_requested", "size": 30},
        {"action": "free_completed", "size": 30},
    ]  # fmt: skip
    calls: list[dict[str, Any]] = []

    def start(enabled: str, **options: Any) -> None:
        calls.append(options)
        if "clear_history" in options:
            raise TypeError("an older torch")

    cuda = SimpleNamespace(
        synchronize=lambda: None,
        memory=SimpleNamespace(
            _record_memory_history=start, _snapshot=lambda: {"device_traces": [list(history)]}
        ),
    )

    found = run_case(Case("x", {}, lambda: lambda: history.extend(added)), CudaWatch(cuda))

    assert found["forward"] == {"events": [100, 30, -30], "peak_bytes": 130, "kept_bytes": 100}
    assert "clear_history" not in calls[-1]


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_is_loaded_and_recorded(way: str, tmp_path: Path) -> None:
    """Each way holds the weights at its end, and every event of it is there."""
    save_model(tmp_path, LLAMA)
    weights = (tmp_path / "model.safetensors").stat().st_size

    found = load_and_record(way, tmp_path, CpuDevice())

    assert "error" not in found
    assert found["trace_error"] is None
    assert set(WAYS) == set(LOADING_WAYS)
    last = found["phases"][-1]
    assert (last["phase"], last["step"]) == ("load" if way == "trainer" else "adapters", 0)
    # The CPU maps weights from their file where transformers loads them, past the allocator.
    assert last["allocated_bytes"] > (weights // 2 if way == "trainer" else 0)
    assert found["trace"]["num_events"] > 20


def test_records_of_a_gpu_are_cases_of_the_accuracy_report(tmp_path: Path) -> None:
    """They are compared and go into the error bands; those of the CPU, and failures, do not."""
    record = begin(tmp_path)
    double = CudaDouble(flattened(record.job.replace(gpu="NVIDIA H200"), record), record.job.allocator)
    assert measure(record, lambda: cuda_device(double)) == 0
    reserved = max(phase["reserved_peak_bytes"] for phase in record.fields["phases"])
    limits = {"tries": [], "smallest_bytes": reserved, "largest_failed_bytes": reserved - 2 * MiB}
    record.update(limits=limits)
    add_prediction(record)
    for name, changes in {"cpu": {"device": {"type": "cpu"}}, "failed": {"outcome": "failed"}}.items():
        RecordFile(tmp_path / f"{name}.json", {**record.fields, **changes}).update()

    (case,) = load_recorded(tmp_path)
    rows = compare(case)

    assert {row.group for row in rows} == {RECORDED}
    assert {row.measured.statistic: row.error for row in rows if row.measured.statistic != "device"} == {
        "allocated": 0.0, "reserved": 0.0,
    }  # fmt: skip
    assert (
        next(row for row in rows if row.measured.statistic == "device").measured.bytes
        == reserved + CONTEXT_BYTES
    )
    need = compare_need(case)
    assert need is not None
    assert need.reserved_bytes == reserved
    assert "1 recorded runs on one GPU" in error_bands(rows, [need])["all"]["source"]
    assert load_recorded(tmp_path / "nowhere") == []
