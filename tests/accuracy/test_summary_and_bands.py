"""The arithmetic of the accuracy report: medians, percentiles, bands."""

from __future__ import annotations

import pytest
from benchmarks.bands import error_bands
from benchmarks.compare import NeedRow, Row
from benchmarks.published import Case, Measurement
from benchmarks.summary import summarize


def row(
    number: int, method: str, measured: int, predicted: int, *, gpus: int = 1, trust: str = "high"
) -> Row:
    """A row of an allocated peak, from one of three sources."""
    figure = Measurement("allocated", measured, "")
    source = f"source {number % 3}"
    case = Case(f"{method}-{number}", source, "", "", gpus, "", figure, trust, fields={"method": method})
    return Row(case, figure, predicted)


def test_summary_of_errors():
    """Median and percentile of absolute values, the worst with its sign, and how many are too low."""
    summary = summarize([0.01, -0.02, 0.03, -0.3, 0.0])

    assert 5 == summary.count
    assert 0.02 == summary.median
    assert 0.192 == pytest.approx(summary.p90)
    assert -0.3 == summary.worst
    assert 2 == summary.too_low


def test_nothing_has_no_summary():
    """An empty group is an error, not zeros."""
    with pytest.raises(ValueError, match="nothing"):
        summarize([])


def test_bands_are_by_method_and_rounded_outwards():
    """measured / predicted - 1, with zero inside; a method with 18 runs has none of its own."""
    rows = [row(number, "lora", 100, 100) for number in range(17)]
    rows += [row(17, "lora", 100_000, 103_093), row(18, "lora", 100_000, 99_001)]
    rows += [row(number, "full", 100, 80) for number in range(18)]
    rows += [row(number, "lora", 100, 50, gpus=2) for number in range(20, 39)]
    rows += [row(40, "lora", 100, 10, trust="low")]
    bands = error_bands(rows, [])

    assert {"all", "lora", "sharded"} == bands.keys()
    assert (-0.0301, 0.0101) == (bands["lora"]["low"], bands["lora"]["high"])
    assert (-0.0301, 0.25) == (bands["all"]["low"], bands["all"]["high"])
    assert (0.0, 1.0) == (bands["sharded"]["low"], bands["sharded"]["high"])
    assert bands["lora"]["source"].startswith("smallest and largest error on 19 published LoRA runs")


def test_two_sources_make_no_band_of_a_kind():
    """However many runs they publish: their software and their way to measure are the same."""
    rows = [row(number, "lora", 100, 100) for number in range(60) if number % 3]

    assert {"all"} == error_bands(rows, []).keys()
    assert {"all", "lora"} == error_bands([*rows, row(60, "lora", 100, 100)], []).keys()


def test_a_need_beyond_what_a_run_reserved_widens_the_band():
    """A run that completed in 100 needs no more: a need of 125 was 20 % too high at least."""
    rows = [row(number, "full", 100, 100) for number in range(19)]
    need = NeedRow(rows[0].case, allocated_bytes=90, reserved_bytes=100, predicted_bytes=125)

    assert 0.25 == need.error
    assert -0.2 == error_bands(rows, [need])["full"]["low"]


@pytest.mark.parametrize(("predicted", "error"), [(80, -0.2), (100, 0.0), (110, 0.0), (150, 0.25)])
def test_a_need_is_held_to_the_interval_that_a_run_shows(predicted: int, error: float):
    """Between the allocated peak of 100 and the reserved one of 120."""
    need = NeedRow(row(0, "full", 1, 1).case, 100, 120, predicted)

    assert error == pytest.approx(need.error)
