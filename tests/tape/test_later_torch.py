"""What is said, and left alone, where the torch that is installed is later than the one that is planned for."""

from __future__ import annotations

import sys

import pytest

from memplan.budget.estimate import estimate
from memplan.job.spec import Job
from memplan.model.resolve import resolve_config, resolve_model
from memplan.tape.backends import LATEST, TORCH
from memplan.tracing.estimate import estimate_traced
from memplan.tracing.lean import without_the_unused


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (None, ""),
        ("{}.{}.1+cpu".format(*TORCH), ""),
        ("{}.{}.0".format(*LATEST), "which is known not to do all on a GPU as it is planned"),
        (f"{LATEST[0]}.{LATEST[1] + 1}.0", "which memplan was never run beside"),
    ],
)
def test_a_trace_names_a_later_torch_once(monkeypatch: pytest.MonkeyPatch, installed: str | None, said: str):
    """None of that version and of the ones before. A plan by shape does not look: it is of the job alone."""
    monkeypatch.setattr("memplan.tracing.step_notes.installed_torch_version", lambda: installed)
    job, config = Job(model="gpt2", max_seq_len=64), resolve_config("gpt2", offline=True).config
    traced = estimate_traced(job, dict(config))[1].warnings
    planned = estimate(job, resolve_model("gpt2")).warnings

    assert [said] * bool(said) == [said for note in traced if f"with torch {installed}, {said}" in note]
    assert not [note for note in planned if f"torch {installed}," in note]


@pytest.mark.parametrize(
    ("installed", "waits"), [("2.13.0", True), ("2.14.0", False), ("2.15.0+cu132", False)]
)
def test_a_later_torch_is_imported_whole(monkeypatch: pytest.MonkeyPatch, installed: str, waits: bool):
    """Which of its modules can wait is known of 2.13 alone."""
    monkeypatch.setattr("memplan.tracing.lean.installed_torch_version", lambda: installed)
    before = len(sys.meta_path)
    with without_the_unused():
        assert waits == (len(sys.meta_path) > before)
    assert before == len(sys.meta_path)
