"""`python -m benchmarks.trainers` on two tiny steps, with the trainers in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("datasets")
from benchmarks.trainers import page
from benchmarks.trainers.case import MINIATURE, make_job, prepare
from benchmarks.trainers.child import Outcome, Turns, train
from benchmarks.trainers.contest import (
    REFERENCE,
    SFT,
    VARIANTS,
    loss_difference,
    speed_ratio,
)

pytestmark = pytest.mark.torch
OURS = "memplan, chunked loss"


def test_both_trainers_do_the_same_steps(tmp_path: Path) -> None:
    """Same tokens and same losses, each step in its turn, and memory that holds the weights at least."""
    job = make_job(tmp_path, "lora", MINIATURE, "float32")
    turns: list[str] = []
    outcomes: dict[str, Outcome] = {}
    for name in (OURS, REFERENCE):
        folder = tmp_path / name.replace(" ", "-")
        prepare(job.replace(**VARIANTS[name]), folder)
        outcomes[name] = train(name, folder, Turns(lambda name=name: turns.append(name)))  # type: ignore[misc]

    ours, theirs = outcomes[OURS], outcomes[REFERENCE]
    embeddings_bytes = 2 * MINIATURE.vocab_size * MINIATURE.hidden * 4
    assert turns == [OURS] * 2 + [REFERENCE] * 2
    assert ours.tokens == theirs.tokens
    assert len(ours.losses) == 2 and ours.losses[0] != ours.losses[1]
    assert loss_difference(ours, theirs) < 1e-5
    assert min(ours.peak_bytes, theirs.peak_bytes) > embeddings_bytes
    assert len(ours.cpu_seconds) == len(theirs.wall_seconds) == 2
    assert min(ours.cpu_seconds) > 0


def outcome(seconds: float, *, tokens: int = 100, loss: float = 2.0, peak_bytes: int = 2**20) -> Outcome:
    """Of seven steps."""
    return Outcome([loss] * 7, [tokens] * 7, [seconds] * 7, [seconds] * 7, peak_bytes)


def test_the_table_compares_with_the_reference() -> None:
    """Ratios are those to transformers' Trainer; other batches have no loss to compare; what is missing is said."""
    outcomes = {
        OURS: outcome(0.5, loss=2.5, peak_bytes=2**19),
        "memplan, chunked loss, packing": outcome(0.5, tokens=200),
        REFERENCE: outcome(1.0),
    }
    rows = dict(line.strip("| ").split(" | ", 1) for line in page.table(outcomes, "cpu").splitlines()[2:])

    assert speed_ratio(outcomes[OURS], outcomes[REFERENCE], clock="cpu_seconds") == 2
    assert rows[OURS] == "200 | 2.00 | 2.00 | 0.5 | 0.500 | 5.0e-01"
    assert rows["memplan, chunked loss, packing"] == "400 | 4.00 | 4.00 | 1.0 | 1.000 | -"
    assert rows[SFT].startswith("not installed")


def test_the_page_names_versions_and_settings() -> None:
    """What was run, with what, and what had to be set."""
    text = page.render({"lora": {REFERENCE: outcome(1.0)}}, MINIATURE, "cpu", "float32")

    assert "## LoRA" in text and "transformers " in text and "train_sampling_strategy" in text
    assert "## Full fine-tuning\n\nNot run." in text
    assert f"width {MINIATURE.hidden}" in text
