"""`--on-oom replan`: the run goes on with a change, and learns what the undisturbed one learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_runs import losses, prepared, tiny_job  # noqa: E402

from memplan.job.load import LoadedJob  # noqa: E402
from memplan.job.spec import Job  # noqa: E402
from memplan.train import launch as launch_function  # noqa: E402
from memplan.train.output_folder import read_job  # noqa: E402
from memplan.train.record import Record  # noqa: E402
from memplan.train.worker import run_job  # noqa: E402

pytestmark = pytest.mark.torch


def _launch_here(
    monkeypatch: pytest.MonkeyPatch, job: Job, root: Path, fails_at: int
) -> tuple[int, list[bool]]:
    """
    Launch with the worker in this process, where a micro batch of more than one runs out of memory at a step; the exit
    code, and whether each run resumed.
    """
    import importlib

    resumed: list[bool] = []

    def run(folder: Path, job: Job, member: object, *, resume: bool, **rest: Any) -> int:
        def fail(phase: str, step: int) -> None:
            if (phase, step) == ("backward", fails_at) and job.micro_batch_size > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB")

        resumed.append(resume)
        return run_job(folder, resume=resume, hook=fail)

    monkeypatch.setattr(importlib.import_module("memplan.train.launch"), "_run", run)
    return launch_function(LoadedJob(job, {}, None, root, ()), replans=True), resumed


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_replanned_run_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fails_at: int
) -> None:
    """From the checkpoint, or from step 1, with the global batch kept; each loss is that of the whole run."""
    whole = prepared(tiny_job(tmp_path, train__save_every=2, train__max_steps=3))
    assert run_job(whole) == 0
    job = tiny_job(tmp_path, train__save_every=2, train__max_steps=3)
    job = job.replace(**{"train.output_dir": str(tmp_path / "replanned")})
    folder = Path(job.train.output_dir)

    code, resumed = _launch_here(monkeypatch, job, tmp_path, fails_at)

    assert code == 0
    changed = read_job(folder / "job.yaml")
    assert changed != job
    assert changed.global_batch_size == job.global_batch_size
    assert resumed == [False, *[fails_at == 3] * (len(resumed) - 1)]
    assert len(resumed) > 1
    text = capfd.readouterr().err
    assert "replanned: " in text
    assert "out of memory in backward" in text
    assert list(losses(whole)) == list(losses(folder))
    for step, loss in losses(whole).items():
        assert losses(folder)[step] == pytest.approx(loss, rel=1e-4)


def test_without_a_change_it_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the record names no change, the exit code is that of the first run."""
    from memplan.train import worker

    monkeypatch.setattr(worker, "smallest_change", lambda *args: None)
    job = tiny_job(tmp_path)

    code, resumed = _launch_here(monkeypatch, job, tmp_path, fails_at=1)

    assert (code, resumed) == (1, [False])
    record = Record.read(Path(job.train.output_dir))
    assert record is not None
    assert (record.fields["outcome"], record.fields["replan"]) == ("out_of_memory", None)
