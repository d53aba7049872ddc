"""Runs of this machine, remembered for the next estimate of the same job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memplan.cli.main import main
from memplan.job.spec import Job
from memplan.model import resolve_model
from memplan.store import fingerprint, past_runs, remember_run, store_path


def _record(device: str, peak_bytes: int, day: int, **fields: Any) -> dict[str, Any]:
    return {
        "job": {"model": "gpt2"},
        "device": {"name": device},
        "versions": {"torch": "2.13.0"},
        "plan": {"peak": {"allocated_bytes": 5}},
        "measured": {"peak": {"allocated_peak_bytes": peak_bytes, "reserved_bytes": None}},
        "finished_at": f"2026-01-{day:02}T00:00:00+00:00",
        **fields,
    }


def test_where_the_store_is() -> None:
    """MEMPLAN_HOME before XDG_DATA_HOME before the home folder; empty is nowhere."""
    assert store_path({"MEMPLAN_HOME": "/m", "XDG_DATA_HOME": "/x"}) == Path("/m/runs.jsonl")
    assert store_path({"XDG_DATA_HOME": "/x", "HOME": "/h"}) == Path("/x/memplan/runs.jsonl")
    assert store_path({"HOME": "/h"}) == Path("/h/.local/share/memplan/runs.jsonl")
    assert store_path({"MEMPLAN_HOME": "", "HOME": "/h"}) is None
    assert store_path({}) is None


def test_what_makes_two_jobs_the_same() -> None:
    """Data, schedule and names do not; shapes, method and whether there is an evaluation do."""
    gpt2 = resolve_model("gpt2")
    job = Job(model="gpt2")
    key = fingerprint(job, gpt2)

    same = {"train.learning_rate": 1.0, "data.train": "x", "gpu": "24GB", "model": "other"}
    assert all(fingerprint(job.replace(**{name: value}), gpt2) == key for name, value in same.items())
    other = {"micro_batch_size": 2, "lora.rank": 4, "data.eval": "x", "train.max_grad_norm": 1.0}
    assert all(fingerprint(job.replace(**{name: value}), gpt2) != key for name, value in other.items())
    assert fingerprint(job, resolve_model("Qwen/Qwen2.5-7B")) != key


def test_the_newest_run_of_each_device(tmp_path: Path) -> None:
    """Damaged lines and other jobs are left out; a run that measured nothing is not remembered."""
    path = tmp_path / "new" / "runs.jsonl"
    remember_run(path, _record("A", 1 << 30, 1), "k")
    remember_run(path, _record("B", 2 << 30, 2), "k")
    remember_run(path, _record("A", 3 << 30, 3), "k")
    remember_run(path, _record("A", 4 << 30, 4), "other")
    remember_run(path, _record("A", 0, 5, measured={"peak": None}), "k")
    with path.open("a") as file:
        file.write('{"fingerprint": "k"}\n[1]\n{half')

    assert [(run["device"]["name"], run["measured_bytes"]) for run in past_runs(path, "k")] == [
        ("B", 2 << 30),
        ("A", 3 << 30),
    ]
    assert past_runs(None, "k") == past_runs(tmp_path / "nowhere", "k") == []
    remember_run(None, _record("A", 1, 1), "k")
    remember_run(tmp_path, _record("A", 1, 1), "k")  # a folder cannot be written to


def test_an_estimate_mentions_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr; what is on stdout is the same with and without."""
    arguments = ["estimate", "--set", "model=gpt2", "--set", "max_seq_len=64", "--format", "json"]
    assert main(arguments) == 0
    before = capsys.readouterr()
    assert "measured here" not in before.err
    key = fingerprint(Job(model="gpt2", max_seq_len=64), resolve_model("gpt2"))
    remember_run(tmp_path / "runs.jsonl", _record("NVIDIA X", 3 << 30, 7), key)
    monkeypatch.setenv("MEMPLAN_HOME", str(tmp_path))

    assert main(arguments) == 0

    after = capsys.readouterr()
    assert (
        "measured here before: 3.00 GiB allocated at the peak on NVIDIA X, torch 2.13.0, 2026-01-07"
        in after.err
    )
    assert json.loads(after.out) == json.loads(before.out)


@pytest.mark.torch
def test_a_completed_run_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured peak is that of its record, under the fingerprint that an estimate looks for."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    from tiny_runs import prepared, tiny_job

    from memplan.train.record import Record
    from memplan.train.worker import run_job

    monkeypatch.setenv("MEMPLAN_HOME", str(tmp_path / "home"))
    job = tiny_job(tmp_path)
    folder = prepared(job)

    assert run_job(folder) == 0

    (run,) = past_runs(tmp_path / "home" / "runs.jsonl", fingerprint(job, resolve_model(job.model)))
    record = Record.read(folder)
    assert record is not None
    assert run["measured_bytes"] == record.fields["measured"]["peak"]["allocated_peak_bytes"]
