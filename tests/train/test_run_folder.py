"""What `memplan watch` sees in the folder of a run."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from memplan.cli.main import main
from memplan.errors import RunError
from memplan.render.watch_text import watch_line, watch_lines
from memplan.train.history import EvaluationHistory
from memplan.train.run_folder import read_tail, view_run


def _line(step: int, **more: Any) -> str:
    fields = {
        "step": step,
        "loss": 5.0 - step / 10,
        "learning_rate": 1e-4,
        "tokens": 100,
        "tokens_per_s": 50.0,
    }
    return json.dumps({**fields, "memory": 1, **more}) + "\n"


def _run(folder: Path, outcome: str = "running", **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "job.yaml").write_text("model: gpt2\n")
    phases = [{"phase": "forward", "step": step, "allocated_peak_bytes": 1000 * step} for step in (1, 2)]
    record = {
        "outcome": outcome,
        "error": None,
        "steps": {"first": None, "last": None, "max": 10},
        "plan": {"phases": [{**phase, "reserved_bytes": 0, "budget": []} for phase in phases]},
        "measured": {"phases": [], "peak": None},
    }
    (folder / "record.json").write_text(json.dumps({**record, **fields}))
    return folder


def test_a_running_run(tmp_path: Path) -> None:
    """Step, loss, evaluation, speed and the time left; a half-written line and a damaged one are left out."""
    folder = _run(tmp_path)
    (folder / "metrics.jsonl").write_text(
        _line(1) + _line(2, eval_loss=4.5) + "{damaged\n" + '{"step": 3, "lo'
    )
    (folder / "checkpoints" / "step-2").mkdir(parents=True)
    (folder / "checkpoints" / ".unfinished-step-3").mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        view = view_run(folder)

    assert (view.state, view.is_over, view.last_step, view.checkpoints) == ("running", False, 2, (2,))
    assert view.tokens_per_s == 50.0
    assert view.seconds_left == 16.0
    line = watch_line(view)
    assert "running  step 2/10  loss 4.8  eval loss 4.5 at step 2  50 tokens/s  16 s left" in line
    assert "peak - (plan 1.95 KiB)" in line
    lines = watch_lines(view)
    assert "saved: step 2 (best)" in lines
    assert any(text.split() == ["forward", "1.95", "KiB", "-"] for text in lines)


@pytest.mark.parametrize(
    ("outcome", "state", "code"),
    [
        ("completed", "completed", 0),
        ("failed", "failed", 1),
        ("out_of_memory", "out of memory", 1),
        ("interrupted", "interrupted", 1),
        ("running", "killed without a word", 1),
    ],
)
def test_runs_that_are_over(
    tmp_path: Path, outcome: str, state: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The outcome is that of the record; one that says `running` while nobody holds the folder was killed."""
    measured = {"phases": [{"phase": "forward", "step": 1, "allocated_peak_bytes": 2048}], "peak": None}
    folder = _run(tmp_path, outcome, measured=measured, error="it broke" if code else None)
    (folder / "final").mkdir()

    assert main(["watch", str(folder)]) == code

    printed = capsys.readouterr().out
    assert state in printed
    assert printed.count("\n") == 1
    assert "peak 2.00 KiB" in printed
    lines = watch_lines(view_run(folder))
    assert ("error: it broke" in lines) == bool(code)
    assert "saved: final" in lines


def test_folders_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another folder and no folder are exit code 2; a run that has only begun is starting, or was killed."""
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError):
            view_run(path)
        assert main(["watch", "--once", str(path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "job.yaml").write_text("model: gpt2\n")
    assert view_run(tmp_path).state == "killed"
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert view_run(tmp_path).state == "starting"
    (tmp_path / "record.json").write_text('{"outcome": "comple')
    assert watch_lines(view_run(tmp_path))[-1] == "saved: nothing yet"


def test_the_tail_of_a_long_file(tmp_path: Path) -> None:
    """Only the end is read, from the first line that is whole."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(_line(step) for step in range(1, 101)))

    lines = read_tail(path, 1000)

    assert [line["step"] for line in lines] == list(range(lines[0]["step"], 101))
    assert 3 < len(lines) < 20


def test_the_best_evaluation_and_patience() -> None:
    """The first of equal losses is the best; patience counts evaluations since then."""
    history = EvaluationHistory()
    assert (history.best_step, history.is_exhausted(1)) == (None, False)
    for step, loss in ((5, 2.0), (10, 1.5), (15, 1.5), (20, 1.6)):
        history.add(step, loss)

    assert (history.best_step, history.num_since_best) == (10, 2)
    assert [history.is_exhausted(patience) for patience in (None, 1, 2, 3)] == [False, True, True, False]
    lines = [{"step": 1, "loss": 3.0}, {"step": 5, "loss": 3.0, "eval_loss": 2.0}]
    assert EvaluationHistory.from_metrics(lines).losses == {5: 2.0}
