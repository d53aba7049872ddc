"""The parts that screens are made of."""

import io

import pytest
from handmade import points

from memplan.render.screen import Screen, can_encode, clip, columns, gib, screen_for, wants_colour
from memplan.render.timeline import draw_timeline, in_reach
from memplan.units import GiB


class Terminal(io.StringIO):
    """A string buffer that says it is a terminal."""

    def isatty(self):
        return True


def test_styles_do_not_change_the_text():
    """What is printed in colour and what is printed plain are the same characters."""
    screen = Screen()
    screen.line(("fits", "bold green"), ": needs ", ("1.00 GiB", "red"))

    assert "fits: needs 1.00 GiB\n" == screen.plain()


def test_colour_goes_through_rich(monkeypatch):
    """On a terminal the styles become escape sequences around the same text."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen()
    screen.line(("fits", "bold green"), ": [2, 4096] stays as it is")
    terminal = Terminal()

    screen.coloured(terminal)

    assert "\x1b[1;32mfits\x1b[0m: [2, 4096] stays as it is\n" == terminal.getvalue()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_colour_is_for_terminals_that_want_it(monkeypatch, environ, expected):
    """A pipe never gets colour, a terminal unless it or the user says no."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    assert expected == wants_colour(Terminal())
    assert not wants_colour(io.StringIO())


@pytest.mark.parametrize(("terminal", "expected"), [("40", 80), ("90", 90), ("200", 100)])
def test_screens_are_80_to_100_columns_wide(monkeypatch, terminal, expected):
    """Narrower would break the tables, wider would not be read."""
    monkeypatch.setenv("COLUMNS", terminal)

    assert expected == screen_for(io.StringIO()).width


def test_an_encoding_without_block_characters_gets_ascii():
    """A C locale or an old console cannot show blocks."""
    ascii_file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    assert not can_encode(ascii_file, "█")
    assert not screen_for(ascii_file).unicode
    assert screen_for(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")).unicode


def test_columns_align():
    """Numbers are right-aligned, words left-aligned, and no line has trailing blanks."""
    lines = columns([["a", "1.00"], ["longer", "10.00"], ["b", ""]], right=[1])

    assert ["a        1.00", "longer  10.00", "b"] == lines
    assert [] == columns([])


@pytest.mark.parametrize(
    ("num_bytes", "expected"), [(0, "-"), (1, "<0.01"), (GiB // 100, "0.01"), (1500 * GiB, "1,500.00")]
)
def test_something_is_told_apart_from_nothing(num_bytes, expected):
    """A table cell never shows 0.00 for bytes that are there."""
    assert expected == gib(num_bytes)


def test_clip_keeps_both_ends():
    """The layer is at the front of a name, the tensor at its end."""
    name = "model.layers.31.self_attn.q_proj.lora_A.default.weight"

    assert 30 == len(clip(name, 30))
    assert clip(name, 30).startswith("model.layers") and clip(name, 30).endswith("weight")
    assert name == clip(name, len(name))


@pytest.mark.parametrize("width", [80, 88, 100])
@pytest.mark.parametrize("unicode", [True, False])
def test_a_timeline_stays_within_its_width(width, unicode):
    """Chart, axis and names fit the screen, and ASCII is ASCII."""
    lines = draw_timeline(points(), width=width, unicode=unicode, limit_bytes=23 * GiB)

    assert max(map(len, lines)) <= width
    assert unicode or "".join(lines).isascii()


def test_a_timeline_shows_the_peak_at_the_top_and_each_phase_below():
    """The highest value labels the highest row, and phases and steps are named in order."""
    lines = draw_timeline(points(), width=100)

    assert "21.75" in lines[0] and "█" in lines[0]
    assert ["load", "fwd", "bwd", "fwd", "bwd", "opt"] == lines[-2].split()
    assert ["step", "1", "step", "2"] == lines[-1].split()


def test_the_capacity_is_drawn_where_it_is_in_reach():
    """A limit just above the peak is a line of dashes with its value; a far one would flatten the curve."""
    near = draw_timeline(points(), width=100, limit_bytes=24 * GiB)
    far = draw_timeline(points(), width=100, limit_bytes=80 * GiB)

    assert "24.00" in near[0] and "----" in near[0]
    assert draw_timeline(points(), width=100) == far
    assert in_reach(points(), 24 * GiB) and not in_reach(points(), 80 * GiB) and not in_reach((), GiB)


def test_a_limit_below_the_peak_crosses_the_curve():
    """Where it does not fit, the curve rises above the dashes."""
    lines = draw_timeline(points(), width=100, limit_bytes=15 * GiB)
    [row] = [line for line in lines if "--" in line and "15.00" in line]

    assert "█" in row and "█" in lines[0]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_few_points_are_stretched(count):
    """A short tape fills the width too, and an empty one draws nothing."""
    lines = draw_timeline([("load", 0, GiB)] * count, width=80)

    assert (["█" * 70] * 7 if count else []) == [line[10:] for line in lines[:7]]


def test_many_phases_keep_the_names_that_have_room():
    """With hundreds of accumulated micro batches, names that would overlap are left out."""
    many = [(phase, 1, GiB) for _ in range(200) for phase in ("forward", "backward")]
    lines = draw_timeline(many, width=80)

    assert "step 1" == lines[-1].strip()
    assert len(lines[-2]) <= 80


def test_names_belong_to_the_columns_where_their_phase_begins():
    """The name of a phase starts at its first column."""
    half = [("forward", 1, GiB)] * 10 + [("backward", 1, 2 * GiB)] * 10
    lines = draw_timeline(half, width=80, height=2)

    assert lines[0].index("█") == lines[-2].index("bwd")
