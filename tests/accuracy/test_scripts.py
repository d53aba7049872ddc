"""Steps that sources measured in scripts of their own: what the committed traces say, and some of them made again."""

from __future__ import annotations

import pytest
from benchmarks.compare import SCRIPTED, Row
from benchmarks.published import load_published
from benchmarks.scripts import SCRIPTS, trace_script
from benchmarks.trace_cases import HIGHEST, LOWEST, load_traced_cases
from benchmarks.traced import load_traced_rows

from memplan.units import MiB

CASES = {case.id: case for case in load_published() if case.script}


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], Row]:
    """By case and statistic."""
    return {(row.case.id, row.measured.statistic): row for row in load_traced_rows() if row.group == SCRIPTED}


def test_every_script_is_traced(rows: dict[tuple[str, str], Row]) -> None:
    """13 cases, of 3 kinds of step; each that published its reserved memory has that beside its allocated peak."""
    assert 13 == len(CASES)
    assert set(CASES) == {name for name, statistic in rows if statistic == "allocated"}
    assert set(SCRIPTS) == {case.script["step"] for case in CASES.values()}


def test_allocated_peaks(rows: dict[tuple[str, str], Row]) -> None:
    """Heads and losses within 0.05 %, encoders within 0.3 %."""
    for (name, statistic), row in rows.items():
        if statistic == "allocated":
            assert abs(row.error) < (0.003 if row.case.script["step"] == "encoder" else 0.0005), name


def test_reserved_peaks_of_encoders(rows: dict[tuple[str, str], Row]) -> None:
    """
    With 512 tokens to the byte, in whatever order the driver's addresses are; with 2048 within 3 %, and in another
    order DistilBERT's is above the measurement, BERT's still 12 MiB below.
    """
    traced = load_traced_cases()["cases"]
    for model in ("bert", "distilbert"):
        short = rows[f"preflight-{model}-base-uncased-b4-s128", "reserved"]
        assert short.measured.bytes == short.predicted_bytes
        assert {short.predicted_bytes} == {traced[short.case.id][which] for which in (LOWEST, HIGHEST)}
        long = rows[f"preflight-{model}-base-uncased-b8-s256", "reserved"]
        assert -0.03 < long.error < 0
        beyond = traced[long.case.id][HIGHEST] - long.measured.bytes
        assert beyond > 0 if model == "distilbert" else beyond == -12 * MiB


@pytest.mark.parametrize(
    "name", ["preflight-distilbert-base-uncased-b4-s128", "liger-comp-flce-liger-bt4096"]
)
def test_a_trace_made_now_is_the_recorded_one(name: str) -> None:
    """Whatever versions are installed: none of these steps depends on them so far."""
    assert load_traced_cases()["cases"][name] == trace_script(CASES[name])


@pytest.mark.parametrize(("model", "parameters"), [("bert", 109_482_240), ("distilbert", 66_362_880)])
def test_encoders_are_those_that_the_source_counted(model: str, parameters: int) -> None:
    """`params` of its file."""
    script = SCRIPTS["encoder"](model_type=model, batch=1, length=8)

    assert parameters == sum(parameter.numel() for parameter in script.models[""].parameters())
