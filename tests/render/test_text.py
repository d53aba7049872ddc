"""What people read: estimate, fit and its frontier."""

from dataclasses import replace

import pytest
from handmade import make_capacity, make_change, make_result, phase

from memplan.fit.frontier import Frontier
from memplan.preflight.verdict import judge
from memplan.render.fit_text import fit_screen
from memplan.render.report import Report
from memplan.render.screen import Screen
from memplan.render.text import estimate_screen, paragraph
from memplan.render.words import set_flags, worst_phases
from memplan.units import GiB


def estimate_text(result, width=100, unicode=True):
    """The estimate as plain text."""
    screen = Screen(width, unicode=unicode)
    estimate_screen(screen, result)
    return screen.plain()


def fit_text(report):
    """The fit as plain text."""
    screen = Screen()
    fit_screen(screen, report)
    return screen.plain()


def judged(usable_gib, **changes):
    """The made result with its verdict on a card."""
    result, capacity = make_result(**changes), make_capacity(usable_gib)
    return replace(result, capacity=capacity, verdict=judge(result, capacity))


@pytest.mark.parametrize(("usable_gib", "state"), [(24, "fits"), (23.2, "tight"), (20, "does not fit")])
def test_the_first_line_is_the_verdict(usable_gib, state):
    """Whoever reads one line reads the answer with both numbers."""
    first = estimate_text(judged(usable_gib)).splitlines()[0]

    assert first.startswith(f"{state}: needs 23.00 GiB")
    assert f"{usable_gib:.2f} GiB usable on 24GB" in first


def test_without_a_capacity_the_first_line_is_the_need():
    """No question about a card, no verdict."""
    assert "needs 23.00 GiB per GPU" == estimate_text(make_result()).splitlines()[0]


def test_an_unknown_verdict_says_so():
    """`unknown` reads as what it means."""
    result = make_result(verdict=judge(make_result(), None))

    assert estimate_text(result).startswith("cannot tell: needs 23.00 GiB")


def test_the_peak_is_named_by_moment_and_tensor():
    """When it is, and the tensor and module that make it."""
    assert "peak in backward of step 2: lm_head: gradient of the logits" in estimate_text(make_result())


def test_columns_of_the_table_add_up():
    """Each column is one moment, so categories sum to allocated."""
    rows = [line.split() for line in estimate_text(make_result()).splitlines()]
    begin, end = (next(i for i, row in enumerate(rows) if row[:1] == [name]) for name in ("GiB", "allocated"))
    cells = [
        [0.0 if cell in ("-", "<0.01") else float(cell) for cell in row[-4:]]
        for row in rows[begin + 1 : end + 1]
    ]

    assert cells[-1] == [pytest.approx(sum(column), abs=0.01) for column in zip(*cells[:-1])]


def test_a_phase_is_shown_at_its_worst_step():
    """The forward pass of step 2 is higher than that of step 1, as the optimizer states are there."""
    assert [("load", 0), ("forward", 2), ("backward", 2), ("optimizer_step", 2)] == [
        (line.phase, line.step) for line in worst_phases(make_result())
    ]


def test_unknown_phases_and_categories_are_shown_rather_than_dropped():
    """Bytes that another engine reports under a new name still appear."""
    result = make_result(phases=(*make_result().phases, phase("evaluation", 2, 23, weights=12.5, kv_cache=2)))
    text = estimate_text(result)

    assert "evaluation" in text and "kv_cache" in text


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("unicode", [True, False])
def test_no_line_is_wider_than_the_screen(width, unicode):
    """Long names are clipped and long warnings are wrapped."""
    result = judged(20, warnings=("word " * 60 + "end",))
    top = (replace(result.top[0], where="model." + "layers." * 30 + "weight"), *result.top)
    text = estimate_text(replace(result, top=top), width, unicode)

    assert max(map(len, text.splitlines()[1:])) <= width
    assert unicode or text.isascii()


def test_a_result_without_phases_timeline_and_top_is_still_readable():
    """Another engine may know only the totals."""
    text = estimate_text(make_result(phases=(), timeline=(), top=()))

    assert "need" in text and "GiB  tensor" not in text and "live tensors in GiB" not in text


def test_warnings_are_wrapped_under_their_label():
    """Continuation lines are indented, so the label stands out without colour."""
    screen = Screen(80)
    paragraph(screen, "warning:", "word " * 30)

    first, *rest = screen.plain().splitlines()
    assert first.startswith("warning: word")
    assert rest and all(line.startswith("  word") for line in rest)


def report(changes, usable_gib=20, **fields):
    """A fit whose job does not fit."""
    result = replace(judged(usable_gib), changes=changes)
    return Report(result, "fit", "job.yaml --set gpu=24GB", **fields)


def test_fit_shows_the_smallest_change_and_the_line_to_paste():
    """What to do comes first, with what it saves, leaves and costs."""
    text = fit_text(report((make_change(),)))

    assert text.startswith("does not fit")
    assert "smallest change: recompute every block in backward" in text
    assert "needs 18.00 GiB, saves 5.00 GiB, leaves 6.00 GiB to spare" in text
    assert "slower (a step takes about 1.33 times as long)" in text
    assert "memplan train job.yaml --set gpu=24GB --set activation_checkpointing=full" in text
    assert "runners-up" not in text


def test_fit_shows_runners_up_with_saving_and_cost():
    """A person can choose: every other change with its own line to paste."""
    free = make_change(set={"loss": "chunked"}, summary="loss in chunks", tier=0, slowdown=1.0)
    shorter = make_change(
        set={"max_seq_len": 2048}, summary="shorter sequences", tier=3, slowdown=1.0, need_bytes=16 * GiB
    )
    text = fit_text(report((free, make_change(), shorter), truncations={2048: (12, 3400)}))

    assert "costs nothing" in text
    assert ["2", "5.00", "6.00", "x", "1.33", "slower"] in [line.split() for line in text.splitlines()]
    assert "--set max_seq_len=2048" in text
    assert "truncates 12 of 3,400 samples at 2048 tokens" in text


def test_fit_says_when_there_is_nothing_to_change():
    """A job that fits needs no change."""
    unchanged = make_change(set={}, summary="fits as it is", tier=0, slowdown=1.0)

    assert "nothing to change" in fit_text(report((unchanged,), usable_gib=24))


@pytest.mark.parametrize("allowed", [True, False])
def test_fit_says_when_nothing_helps(allowed):
    """And names the changes that were not tried, if there are any."""
    text = fit_text(report((), allow_capacity=allowed))

    assert "nothing that we know to change makes it fit" in text
    assert allowed != ("--allow capacity" in text)


def test_a_frontier_names_value_limit_and_line_to_paste():
    """`--maximize` answers with one number and why it is not larger."""
    found = Frontier("max_seq_len", 6144, 23 * GiB, GiB, "capacity")
    text = fit_text(report(None, frontier=found))

    assert "largest max_seq_len that fits: 6144 (the job has 4096)" in text
    assert "the next one does not fit" in text
    assert "--set max_seq_len=6144" in text


def test_a_frontier_without_a_value_names_what_the_smallest_needs():
    """Not even the smallest fits."""
    found = Frontier("micro_batch_size", None, 21 * GiB, -GiB, "capacity")

    assert "no micro_batch_size fits\n  the smallest needs 21.00 GiB" in fit_text(
        report(None, frontier=found)
    )


def test_flags_survive_the_shell():
    """What is printed to paste reads back as the same settings."""
    import shlex

    edits = {"lora.target_modules": ("q_proj", "v_proj"), "autocast": None, "packing": True, "margin": "5%"}

    assert [
        "--set", "lora.target_modules=[q_proj, v_proj]", "--set", "autocast=null", "--set", "packing=true",
        "--set", "margin=5%",
    ] == shlex.split(set_flags(edits))  # fmt: skip
