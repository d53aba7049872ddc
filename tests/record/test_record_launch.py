"""Measuring processes: what is left of them however they end, and the search for limits."""

from __future__ import annotations

import json
import os
import signal
from math import inf
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tiny_records import LLAMA, begin

from memplan.errors import JobError
from memplan.job.load import load_job
from memplan.preflight.environment import VARIABLES
from memplan.record import launch
from memplan.record.device import CpuDevice
from memplan.record.file import RecordError, RecordFile
from memplan.record.launch import (
    Measurement,
    begin_record,
    child_environment,
    find_limits,
    record_job,
    without_folders,
)
from memplan.record.report import record_lines
from memplan.record.worker import measure
from memplan.units import GiB, MiB

pytestmark = pytest.mark.torch


def test_a_process_that_waits_measures_when_it_is_told(tmp_path: Path) -> None:
    """The real process, from the record with the job to the record with the measurements."""
    measurement = Measurement(begin(tmp_path, steps=1), wait=True)
    measurement.go()

    record = measurement.finish(1800)

    assert record.fields["outcome"] == "completed"
    assert record.fields["versions"]["torch"]
    assert record.fields["trace"]["num_events"] > 100


def test_a_job_is_recorded_and_its_plan_put_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of `memplan record`, but for the process."""

    class InProcess:
        def __init__(self, record: RecordFile, **options: Any) -> None:
            self.record = record

        def finish(self, seconds: float) -> RecordFile:
            measure(self.record, CpuDevice)
            return RecordFile.read(self.record.path)

    monkeypatch.setattr(launch, "Measurement", InProcess)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    flags = {
        "model": str(tmp_path), "dtype": "float32", "max_seq_len": 32, "method": "full", "attention": "eager",
    }  # fmt: skip

    record = record_job(load_job(None, flags=flags), tmp_path / "record.json", steps=1)

    assert record.fields["outcome"] == "completed"
    assert record.fields["job"]["weights"] == "random"
    assert record.fields["model_config"] == LLAMA
    lines = list(record_lines(record))
    assert any(line.startswith("allocated, backward of step 1") for line in lines)
    assert abs(record.fields["comparison"][-1]["error"]) < 0.01


def test_a_process_that_waits_can_be_killed(tmp_path: Path) -> None:
    """A process that dies without a word leaves `killed` and how it died."""
    measurement = Measurement(begin(tmp_path), wait=True)
    os.kill(measurement._process.pid, signal.SIGKILL)

    record = measurement.finish(1800)

    assert record.fields["outcome"] == "killed"
    assert "signal 9" in record.fields["error"]


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """Nobody tells this one to begin."""
    measurement = Measurement(begin(tmp_path), wait=True)

    record = measurement.finish(0.01)

    assert record.fields["outcome"] == "time_limit"
    assert measurement._process.returncode is not None


def test_the_process_gets_the_allocator_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the caller's environment give way to those of the job."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    expandable = begin(tmp_path).job
    classic = expandable.replace(**{"allocator.expandable_segments": False})

    def variables(job: Any) -> set[str]:
        environment = child_environment(job)
        return {environment[name] for name in VARIABLES if name in environment}

    assert variables(expandable) == {"expandable_segments:True"}
    assert variables(classic) == set()


def test_limits_close_in_on_the_smallest(tmp_path: Path) -> None:
    """Every try halves what is left, and all of them are in the record."""
    record = begin(tmp_path)
    phase = {
        "phase": "backward",
        "step": 1,
        "allocated_peak_bytes": 10 * GiB,
        "reserved_peak_bytes": 12 * GiB,
    }
    record.update(outcome="completed", phases=[phase])
    truth = 10 * GiB + 700 * MiB

    find_limits(record, time_limit_seconds=inf, completes=lambda _, limit, seconds: limit >= truth)

    limits = RecordFile.read(record.path).fields["limits"]
    assert limits["largest_failed_bytes"] < truth <= limits["smallest_bytes"]
    assert limits["smallest_bytes"] - limits["largest_failed_bytes"] <= 32 * MiB
    assert len(limits["tries"]) <= 8


def test_limits_need_a_measurement_to_begin_with(tmp_path: Path) -> None:
    """A record of the CPU has no reserved bytes to limit."""
    with pytest.raises(RecordError, match="CUDA"):
        find_limits(begin(tmp_path), time_limit_seconds=1)


def test_malformed_questions(tmp_path: Path) -> None:
    """No steps, and a file that is no record."""
    with pytest.raises(RecordError, match="at least one step"):
        begin_record(load_job(None, flags={"model": "gpt2"}), tmp_path / "record.json", steps=0)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(RecordError, match="not a record"):
        RecordFile.read(tmp_path / "other.json")
    with pytest.raises(JobError):
        load_job(None, flags={"model": "gpt2", "loop": "other"})


def test_records_hold_no_folders() -> None:
    """Paths of this machine are cut down to file names."""
    text = 'File "/opt/lib/python3/site.py", line 3, in x: https://pytorch.org/docs, 3/4'

    assert without_folders(text) == 'File "site.py", line 3, in x: https://pytorch.org/docs, 3/4'
