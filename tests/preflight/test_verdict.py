"""Need, error band and margin against a capacity."""

import pytest
from handmade import make_capacity, make_result

from memplan.budget.result import ErrorBand
from memplan.errors import JobError
from memplan.preflight.verdict import judge, less_margin, margin_bytes
from memplan.units import GiB

# The made result needs 23 GiB, the error band is 22.5 to 23.5 GiB.


@pytest.mark.parametrize(
    ("usable_gib", "margin", "state"),
    [
        (24, None, "fits"),
        (23.5, None, "fits"),
        (23.4999, None, "tight"),
        (23, None, "tight"),
        (22.5, None, "tight"),
        (22.4999, None, "does_not_fit"),
        (0, None, "does_not_fit"),
        (23, "0%", "fits"),
        (22.9999, "0%", "does_not_fit"),
        (24, "1GiB", "fits"),
        (23.9999, "1GiB", "tight"),
        (22.9999, "1GiB", "does_not_fit"),
        (25.3, "10%", "fits"),
        (25.2, "10%", "tight"),
    ],
)
def test_state_follows_from_where_the_range_lies(usable_gib, margin, state):
    """All of the range within the capacity fits, none of it does not, and in between it is tight."""
    assert state == judge(make_result(), make_capacity(usable_gib), margin).state


def test_headroom_is_usable_less_need_whatever_the_margin():
    """The headroom is a fact about need and capacity; the margin only moves the verdict."""
    for margin in (None, "5%", "3GiB"):
        assert GiB == judge(make_result(), make_capacity(24), margin).headroom_bytes
    assert -3 * GiB == judge(make_result(), make_capacity(20)).headroom_bytes


@pytest.mark.parametrize(
    ("usable_gib", "second"), [(24, "24.00"), (23.2, "23.20"), (22.75, "22.75"), (20, "20.00")]
)
def test_the_reason_names_both_numbers(usable_gib, second):
    """A verdict is one sentence with the need, the capacity, and the card."""
    reason = judge(make_result(), make_capacity(usable_gib)).reason

    assert "needs 23.00 GiB" in reason
    assert f"{second} GiB usable on 24GB" in reason
    assert not reason.endswith(".")


def test_tight_says_which_end_of_the_band_is_on_the_other_side():
    """Above the need it is the upper end of the band that crosses the capacity, below it the lower one."""
    assert "reaches 23.50 GiB" in judge(make_result(), make_capacity(23.2)).reason
    assert "starts at 22.50 GiB" in judge(make_result(), make_capacity(22.75)).reason
    assert "its margin of 1GiB reaches 24.00 GiB" in judge(make_result(), make_capacity(23.2), "1GiB").reason


def test_memory_of_others_is_named():
    """Who reads that it does not fit is told how much is held by others."""
    assert "(2.00 GiB held by others)" in judge(make_result(), make_capacity(22, others_gib=2)).reason


def test_without_a_capacity_the_verdict_is_unknown():
    """Nothing to compare with is not the same as fitting."""
    verdict = judge(make_result(), None)

    assert ("unknown", None) == (verdict.state, verdict.headroom_bytes)
    assert "23.00 GiB" in verdict.reason


def test_an_error_band_of_no_width_is_never_tight():
    """An exact engine fits or does not."""
    exact = make_result(error_band=ErrorBand(23 * GiB, 23 * GiB, "exact"))

    assert "fits" == judge(exact, make_capacity(23)).state
    assert "does_not_fit" == judge(exact, make_capacity(22.9999)).state


@pytest.mark.parametrize("margin", ["much", "5 percent", "%", "-1GiB", ""])
def test_a_margin_that_is_no_margin_is_an_error(margin):
    """A margin that cannot be read is never taken for none."""
    with pytest.raises(JobError, match="margin"):
        margin_bytes(margin, GiB)


@pytest.mark.parametrize("margin", [None, "0%", "5%", "12.5%", "1GiB", "300MiB"])
def test_what_fits_less_the_margin_fits_with_it(margin):
    """The search for changes and the verdict draw the line at the same need, to the byte."""
    capacity = make_capacity(24)
    room = less_margin(capacity, margin).usable_bytes

    for need, state in ((room, "fits"), (room + 2, "tight")):
        result = make_result(need_bytes=need, error_band=ErrorBand(need, need, "exact"))
        if margin in (None, "0%") and state == "tight":
            state = "does_not_fit"
        assert state == judge(result, capacity, margin).state
