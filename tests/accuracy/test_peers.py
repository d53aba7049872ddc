"""Other tools beside memplan: errors, refusals, and processes that end early."""

from __future__ import annotations

from pathlib import Path
from threading import Timer

import pytest
from benchmarks.peers.__main__ import ask
from benchmarks.peers.errors import Tool, beside
from benchmarks.peers.page import render
from benchmarks.peers.questions import asked, measured, ours
from benchmarks.published import load_published

MEASURED = {"a": {"allocated": 100, "device": 200}, "b": {"allocated": 400}, "c": {"reserved": 50}}
OURS = Tool(
    "memplan, shape", "1", [{"id": run, "predicted": {"allocated": 200}, "seconds": 1.0} for run in "ab"]
)
PEER = Tool(
    "made-up",
    "9",
    [
        {"id": "a", "predicted": {"allocated": 150, "reserved": 1}, "seconds": 9.0},
        {"id": "b", "predicted": {"allocated": 300}, "seconds": 0.5},
        {"id": "c", "word": "cannot express it"},
    ],
)


def test_errors_are_of_what_was_measured_and_predicted() -> None:
    assert PEER.errors(MEASURED, "allocated") == pytest.approx({"a": 0.5, "b": -0.25})
    assert PEER.errors(MEASURED, "reserved") == {}
    assert PEER.errors(MEASURED, "device") == {}


def test_the_first_answer_is_not_a_warm_one() -> None:
    assert PEER.warm_seconds == 0.5


def test_a_tool_is_beside_another_on_the_same_runs_alone() -> None:
    errors, ours = PEER.errors(MEASURED, "allocated"), OURS.errors(MEASURED, "allocated")
    same = beside({"a": errors["a"]}, ours)

    assert same is not None and same.median == pytest.approx(1.0)
    assert beside(errors, {"a": ours["a"]}) is None


def test_the_page_says_what_was_answered_and_what_was_not() -> None:
    page = render([OURS, PEER], MEASURED, {"a": "full", "b": "lora", "c": "lora"}, kernels=0)

    assert "| allocated | made-up | 2 | 37.5% | +50.0% | 50% | 75.0% |" in page
    assert "| allocated | made-up | 50.0% of 1 | 25.0% of 1 |  |" in page
    assert "| made-up | 9 | 2 of 3 |" in page
    assert "| made-up | cannot express it | 1 |" in page


def test_a_process_that_ends_early_leaves_words(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho \'{"version": "2"}\'\necho \'{"id": "a", "word": "no"}\'\nexit 1\n')
    script.chmod(0o755)

    version, replies = ask("fitscout", [{"id": "a"}, {"id": "b"}], str(script), limit=600)

    assert version == "2"
    assert replies == [{"id": "a", "word": "no"}, {"id": "b", "word": "crashed the process"}]


def test_a_process_that_takes_too_long_keeps_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written by the end of the limit counts, but for half a line. Here the limit ends when all is written."""
    script, written = tmp_path / "python", tmp_path / "written"
    lines = """echo '{"version": "2"}'\necho '{"id": "a", "word": "no"}'\nprintf '{"id": '\n"""
    script.write_text(f"#!/bin/sh\n{lines}: >'{written}'\nexec sleep 1800\n")
    script.chmod(0o755)

    class WhenWritten(Timer):
        def run(self) -> None:
            while not written.exists() and not self.finished.wait(0.01):
                pass
            self.interval = 0.0
            super().run()

    monkeypatch.setattr("benchmarks.peers.__main__.Timer", WhenWritten)
    version, replies = ask("fitscout", [{"id": "a"}, {"id": "b"}], str(script), limit=0.5)

    assert version == "2"
    assert replies[0] == {"id": "a", "word": "no"}
    assert replies[1]["id"] == "b" and "no answer within the limit" in replies[1]["word"]


def test_a_peer_that_is_not_installed_gets_that_word(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho '{\"version\": null}'\n")
    script.chmod(0o755)

    assert ask("fitscout", [{"id": "a"}], str(script), limit=600) == (
        None,
        [{"id": "a", "word": "not installed"}],
    )


@pytest.mark.parametrize("engine", ["shape", "shape, told the software", "trace"])
def test_every_engine_answers_in_the_statistics_that_were_measured(engine: str) -> None:
    if engine == "trace":
        for package in ("torch", "transformers", "peft"):
            pytest.importorskip(package)
    cases = asked(load_published())
    case = next(case for case in cases if case.method == "lora" and "allocated" in measured(case))
    predicted = ours(case, engine)["predicted"]
    assert predicted.keys() == measured(case).keys() and all(value > 0 for value in predicted.values())
