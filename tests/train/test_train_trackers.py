"""Where metrics go besides `metrics.jsonl`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memplan.errors import RunError
from memplan.train.refusals import check_trainable
from memplan.train.trackers import open_tracker


def test_wandb_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run goes on under the same id; steps are steps."""
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda numbers, step: calls.append((step, numbers)), finish=lambda: calls.append("finished")
    )
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **options: calls.append(options) or run)
    )

    for _ in range(2):
        tracker = open_tracker("wandb", tmp_path, {"method": "lora"}, resumed_from=0)
        tracker.log({"step": 7, "loss": 1.5, "relative_error": {"3": 0.5}})
        tracker.close()

    first, *rest, again = calls[0], *calls[1:3], calls[3]
    assert rest == [(7, {"loss": 1.5, "relative_error/3": 0.5}), "finished"]
    assert (first["config"], first["resume"]) == ({"method": "lora"}, "allow")
    assert first["id"] == again["id"]


@pytest.mark.torch
def test_tensorboard_writes_beside_the_metrics(tmp_path: Path) -> None:
    """Scalars by step, in the folder of the run."""
    pytest.importorskip("torch")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker("tensorboard", tmp_path, {}, resumed_from=0)
    for step in (1, 2):
        tracker.log({"step": step, "loss": 3.0 - step})
    tracker.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]


@pytest.mark.torch
def test_a_missing_package_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to install, and what to set instead."""
    pytest.importorskip("torch")
    import importlib

    from tiny_runs import tiny_job

    from memplan.job.load import LoadedJob

    refusals = importlib.import_module("memplan.train.refusals")
    monkeypatch.setattr(refusals, "find_spec", lambda name: None if name == "wandb" else object())
    job = tiny_job(tmp_path, train__report_to="wandb")

    with pytest.raises(RunError, match="needs the package `wandb`") as caught:
        check_trainable(LoadedJob(job, {}, None, tmp_path, ()))
    assert "train.report_to=none" in (caught.value.hint or "")
