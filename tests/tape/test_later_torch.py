"""What is said, and left alone, where the torch that is installed is later than the one that is planned for."""

from __future__ import annotations

import sys

import pytest

from memplan.budget.estimate import estimate
from memplan.job.spec import Job
from memplan.model.resolve import resolve_model
from memplan.tape.backends import LATEST, TORCH
from memplan.tracing.lean import without_the_unused

INSTALLED = "memplan.preflight.environment.installed_torch_version"


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (None, ""),
        ("{}.{}.1+cpu".format(*TORCH), ""),
        ("{}.{}.0".format(*LATEST), "which is known not to do all on a GPU as it is planned"),
        (f"{LATEST[0]}.{LATEST[1] + 1}.0", "which memplan was never run beside"),
    ],
)
def test_a_plan_names_a_later_torch_once(monkeypatch: pytest.MonkeyPatch, installed: str | None, said: str):
    """None of that version and of the ones before."""
    monkeypatch.setattr(INSTALLED, lambda: installed)
    notes = estimate(Job(model="gpt2", max_seq_len=128), resolve_model("gpt2")).warnings
    found = [note for note in notes if f"beside torch {installed}" in note]

    assert [said] * bool(said) == [said for note in found if said in note]


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
