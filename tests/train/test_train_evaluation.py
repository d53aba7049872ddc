"""Evaluation during a run: when, what it costs, what is kept of it, and when it ends the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_runs import GPT2, losses, prepared, stops_in, tiny_job  # noqa: E402

from memplan.budget.estimate import estimate  # noqa: E402
from memplan.job.spec import Job  # noqa: E402
from memplan.model import resolve_model  # noqa: E402
from memplan.train import report  # noqa: E402
from memplan.train.growth import GrowthWatch  # noqa: E402
from memplan.train.loop import Evaluation, Loop  # noqa: E402
from memplan.train.measure import inventory  # noqa: E402
from memplan.train.record import PhasePeak, Record, read_metrics_lines  # noqa: E402
from memplan.train.worker import run_job  # noqa: E402

pytestmark = pytest.mark.torch


def _job(root: Path, **changes: Any) -> Job:
    job = tiny_job(root, **changes)
    return job.replace(**{"data.eval": job.data.train})


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir())


def _scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Evaluations that say what they are told to."""
    monkeypatch.setattr(Loop, "evaluate", lambda loop, batches, step: Evaluation(losses[step]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "chunked", "packing": True},
        {"config": GPT2},
        {"method": "npt", "train__sample_prompts": 2, "train__sample_tokens": 4},
        {"method": "npt", "npt__objective": "end_to_end", "npt__logits_weight": 0.5, "packing": True},
        {"method": "npt", "config": GPT2, "dtype": "bfloat16", "npt__stream": "student"},
    ],
    ids=str,
)
def test_its_peak_is_planned(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Evaluation is a phase of the plan and of what is measured, within 1 % of each other, below training's."""
    folder = prepared(_job(tmp_path, train__eval_every=2, train__max_steps=3, **{"method": "full"} | changes))

    assert run_job(folder) == 0

    record = Record.read(folder)
    assert record is not None
    plan, measured = record.fields["plan"], record.fields["measured"]
    (planned,) = (line for line in plan["phases"] if line["phase"] == "evaluation")
    (found,) = (line for line in measured["phases"] if line["phase"] == "evaluation")
    assert found["allocated_peak_bytes"] == pytest.approx(planned["allocated_peak_bytes"], rel=0.01)
    assert planned["allocated_peak_bytes"] < plan["peak"]["allocated_bytes"]
    assert [line["step"] for line in read_metrics_lines(folder) if "eval_loss" in line] == [2, 3]
    last = read_metrics_lines(folder)[-1]
    if changes.get("method") == "npt":
        return
    assert last["eval_perplexity"] == pytest.approx(2.718281828459045 ** last["eval_loss"])


def test_the_best_step_is_kept_and_patience_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The best step is saved when it is found and outlives newer ones; resuming finds nothing left to do."""
    _scripted(monkeypatch, {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.0, 5: 9.0})
    job = _job(
        tmp_path, train__eval_every=1, train__early_stopping=2, train__keep_checkpoints=1, train__max_steps=9
    )
    folder = prepared(job)

    assert run_job(folder) == 0

    assert [1, 2, 3, 4] == list(losses(folder))
    assert [2, 4] == _steps(folder)
    assert (
        "stopping after step 4: 2 evaluations without a lower loss than 2, that of step 2"
        in capfd.readouterr().err
    )
    assert run_job(folder, resume=True) == 0
    assert [1, 2, 3, 4] == list(losses(folder))


def test_only_the_newest_are_kept_without_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`keep_best: false` saves and keeps what `save_every` and `keep_checkpoints` say."""
    _scripted(monkeypatch, {1: 1.0, 2: 2.0, 3: 2.5, 4: 2.0})
    changes = {"train__eval_every": 1, "train__keep_best": False, "train__save_every": 2}
    folder = prepared(_job(tmp_path, train__keep_checkpoints=1, **changes))

    assert run_job(folder) == 0
    assert [4] == _steps(folder)


def test_an_interrupted_run_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations before a fault count after it: the resumed run stops where the whole one does."""
    _scripted(monkeypatch, {1: 1.0, 2: 2.0, 3: 2.5, 4: 2.0, 5: 2.0})
    job = _job(
        tmp_path, train__eval_every=1, train__early_stopping=3, train__save_every=1, train__max_steps=9
    )
    folder = prepared(job)

    assert run_job(folder, hook=stops_in("backward", 3)) == 70
    assert run_job(folder, resume=True) == 0
    assert [1, 2, 3, 4] == list(losses(folder))


def test_memory_that_grows_is_said_once() -> None:
    """A rise at each of five steps, of a MiB in all, is a warning; a rise that stops, or a small one, is none."""
    mib = 1 << 20
    watch = GrowthWatch(None)
    said = [watch.add(step, 100 * mib + step * mib) for step in range(1, 12)]
    assert [step for step, text in enumerate(said, start=1) if text] == [7]
    assert "1.00 MiB a step, now 107.00 MiB" in (said[6] or "")
    flat = GrowthWatch(None)
    assert not any(flat.add(step, 100 * mib + (step % 4) * mib) for step in range(1, 40))
    slow = GrowthWatch(None)
    assert not any(slow.add(step, 100 * mib + step) for step in range(1, 40))


@pytest.mark.parametrize(
    ("grows", "words"),
    [
        ("states", "what grew since step 2: optimizer states by 5.00 MiB"),
        ("gradients", "what grew since step 2: gradients by 1.00 MiB"),
        ("outputs", "none of weights, gradients, optimizer states grew: code keeps other tensors"),
    ],
)
def test_what_grows_is_named(grows: str, words: str) -> None:
    """By what the model and the optimizer really hold; what neither holds belongs to other code."""
    layer = torch.nn.Linear(512, 512, bias=False)
    optimizer = torch.optim.SGD(layer.parameters())
    kept = []
    watch = GrowthWatch(None, lambda: inventory(layer, optimizer))
    for step in range(1, 8):
        said = watch.add(step, step << 20)
        if grows == "states":
            optimizer.state[layer.weight][f"moment {step}"] = torch.zeros(512, 512)
        elif grows == "gradients":
            layer.weight.grad = torch.zeros(512, 512) if step > 2 else None
        else:
            kept.append(torch.zeros(512, 512))

    assert words in (said or "")


def test_first_steps_are_compared_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """After the first steps the run says how it compares; above the band it warns, and says where."""
    folder = prepared(tiny_job(tmp_path, train__max_steps=6))
    assert run_job(folder) == 0
    text = capfd.readouterr().err
    assert text.index("first steps: 1.") < text.index("step 6/6")
    assert "warning" not in text

    job = tiny_job(tmp_path)
    plan = estimate(job, resolve_model(job.model), device="cpu")
    peak = PhasePeak("backward", 2, int(plan.peak.allocated_bytes * 1.7))
    line, warning = report.first_steps_lines(plan, [peak])
    assert line.startswith("first steps: ")
    assert "that is 70.0% above the plan" in warning
    assert "most of it in backward" in warning

    narrow = replace(plan, error_band=replace(plan.error_band, high_bytes=plan.need_bytes))
    for percent, num_lines in ((0.9, 1), (1.1, 2)):
        peak = PhasePeak("backward", 2, int(plan.peak.allocated_bytes * (1 + percent / 100)))
        assert num_lines == len(report.first_steps_lines(narrow, [peak])), percent


def test_plan_and_table_say_that_they_are_of_each_rank(tmp_path: Path) -> None:
    """The plan is that of every process; the table has the highest peak that any of them measured."""
    job = tiny_job(tmp_path, parallel__dp_replicate=2)
    plan = estimate(job, resolve_model(job.model), device="cpu")
    peaks = [
        PhasePeak("forward", 1, num_bytes, rank=rank) for rank, num_bytes in enumerate((1 << 30, 3 << 30))
    ]

    assert "at the peak on each of 2 processes, in" in report.plan_lines(plan, "cpu", num_ranks=2)[0]
    assert "of memory of each GPU in all" in report.plan_lines(plan, "cuda", num_ranks=2)[1]
    heading, forward, *_ = report.comparison_lines(plan, peaks)
    assert heading.startswith("peak, highest of 2 ranks")
    assert "3.00 GiB" in forward
    assert report.comparison_lines(plan, peaks[:1])[0].startswith("peak allocated ")
