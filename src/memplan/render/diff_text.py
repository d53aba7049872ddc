"""A comparison for people: the headline, the totals, where they differ, and what differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memplan.render.screen import Screen, clip, columns, gib
from memplan.render.text import paragraph
from memplan.render.words import CATEGORY_NAMES, PHASE_NAMES, STATES, peak_moment, setting_text
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.budget.result import Result
    from memplan.snapshot.compare import Amount, Comparison
    from memplan.snapshot.diff import TensorChange

MOST_TENSORS = 12


def diff_screen(screen: Screen, comparison: Comparison) -> None:
    """Write everything about a comparison; the last line is the verdict on both sides, where one was asked for."""
    sentence = headline(comparison)
    style = (
        "bold"
        if comparison.need.change_bytes == 0
        else "bold red"
        if comparison.need.change_bytes > 0
        else "bold green"
    )
    screen.line((sentence, style))
    for label, side in (("A", comparison.a), ("B", comparison.b)):
        peak = side.result.peak
        screen.line(f"  {label}: {clip(side.source, 40)}, peak {peak_moment(peak)}: {clip(peak.where, 40)}")
    for line in field_lines(comparison):
        screen.line(f"  {line}")
    for title, rows in tables(comparison):
        lines = columns([[title, "A", "B", "B - A"], *rows], right=[1, 2, 3], gap=3)
        screen.line()
        screen.line((lines[0], "bold"))
        for line in lines[1:]:
            screen.line(line)
    _tensors(screen, comparison)
    notes = notes_on(comparison)
    if notes:
        screen.line()
    for note in notes:
        paragraph(screen, ("note:", "bold"), note)
    verdict = verdict_line(comparison)
    if verdict:
        screen.line()
        screen.line(verdict)


def headline(comparison: Comparison) -> str:
    """
    Both needs and their difference in one line, e.g. `needs 21.40 GiB -> 27.90 GiB: 6.50 GiB more (+30.4 %)`.
    """
    need = comparison.need
    before, after, change = need.a_bytes or 0, need.b_bytes or 0, need.change_bytes
    numbers = f"needs {format_bytes(before)} -> {format_bytes(after)}"
    if change == 0:
        return f"{numbers}: the same"
    word = "more" if change > 0 else "less"
    return f"{numbers}: {format_bytes(abs(change))} {word} ({100 * change / max(before, 1):+.1f} %)"


def field_lines(comparison: Comparison) -> list[str]:
    """What was changed in the job, a line per field."""
    return [
        f"{name}: {setting_text(before)} -> {setting_text(after)}"
        for name, (before, after) in comparison.fields.items()
    ]


def tables(comparison: Comparison) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of name, A, B and change in GiB) of the totals, the categories and the phases."""
    return [
        ("GiB", _rows(comparison.totals, {})),
        ("at the peak", _rows(comparison.categories, CATEGORY_NAMES)),
        ("allocated, highest in", _rows(comparison.phases, PHASE_NAMES)),
    ]


def tensor_rows(comparison: Comparison) -> list[list[str]]:
    """Change in GiB, name, and what it is on each side, of the largest changes."""
    return [
        [change_gib(change.change_bytes), change.where, _of(change, "a"), _of(change, "b")]
        for change in comparison.tensors.changes[:MOST_TENSORS]
    ]


def alike_line(comparison: Comparison) -> str:
    """How much is the same on both sides, and what is not shown."""
    tensors = comparison.tensors
    text = f"alike: {tensors.alike_count:,} tensors, {format_bytes(tensors.alike_bytes)}"
    if tensors.alike_by_size:
        text += f" ({tensors.alike_by_size:,} of them by size, since recordings do not name tensors)"
    rest = tensors.changes[MOST_TENSORS:]
    if rest:
        in_all = format_bytes(sum(change.change_bytes for change in rest))
        text += f"; {len(rest):,} smaller differences of {in_all} in all"
    return text


def notes_on(comparison: Comparison) -> list[str]:
    """What is worth knowing of the recordings that are compared."""
    notes = [
        f"{label}: {note}"
        for label, side in (("A", comparison.a), ("B", comparison.b))
        if side.result.job is None
        for note in side.result.warnings
    ]
    if comparison.a.is_recording != comparison.b.is_recording:
        notes.append("tensors of the recording have the categories of the plan's tensors of the same size")
    return notes


def verdict_line(comparison: Comparison) -> str:
    """The verdict on both sides, in one line; empty where no GPU was asked about."""
    sides = [(label, side.result) for label, side in (("A", comparison.a), ("B", comparison.b))]
    cards = [result.capacity.gpu for _, result in sides if result.capacity is not None]
    parts = [_verdict(label, result) for label, result in sides if result.capacity is not None]
    if len(cards) == 2 and cards[0] == cards[1]:
        return f"on {cards[0]}: " + "; ".join(parts)
    return "; ".join(f"on {card}: {part}" for card, part in zip(cards, parts))


def change_gib(num_bytes: int) -> str:
    """
    A difference for a column headed GiB, always with its sign.

    >>> change_gib(3 << 29), change_gib(-1), change_gib(0)
    ('+1.50', '-<0.01', '-')
    """
    return "-" if num_bytes == 0 else ("+" if num_bytes > 0 else "-") + gib(abs(num_bytes))


def _rows(amounts: Sequence[Amount], names: dict[str, str]) -> list[list[str]]:
    return [
        [
            names.get(amount.name, amount.name),
            "" if amount.a_bytes is None else gib(amount.a_bytes),
            "" if amount.b_bytes is None else gib(amount.b_bytes),
            "" if amount.a_bytes is None or amount.b_bytes is None else change_gib(amount.change_bytes),
        ]
        for amount in amounts
    ]


def _tensors(screen: Screen, comparison: Comparison) -> None:
    rows = tensor_rows(comparison)
    screen.line()
    if rows:
        room = screen.width - 6 - sum(max(len(row[index]) for row in rows) for index in (0, 2, 3))
        header = ["B - A", "tensors at the peak that differ", "A", "B"]
        lines = columns(
            [header, *([row[0], clip(row[1], max(room, 24)), *row[2:]] for row in rows)], right=[0]
        )
        screen.line((lines[0], "bold"))
        for line in lines[1:]:
            screen.line(line)
    screen.line(alike_line(comparison))


def _of(change: TensorChange, side: str) -> str:
    """How many of which shape on one side; a recording has sizes in place of shapes."""
    count, shape = (change.a_count, change.a_shape) if side == "a" else (change.b_count, change.b_shape)
    num_bytes = change.a_bytes if side == "a" else change.b_bytes
    if not count:
        return "-"
    what = format_bytes(num_bytes // count) if shape is None else "[" + ", ".join(map(str, shape)) + "]"
    dtype = change.a_dtype if side == "a" else change.b_dtype
    if dtype is not None and change.a_dtype != change.b_dtype:
        what += f" {dtype}"
    return f"{count} x {what}" if count > 1 else what


def _verdict(label: str, result: Result) -> str:
    assert result.verdict is not None
    headroom = result.verdict.headroom_bytes
    text = f"{label} {STATES[result.verdict.state]}"
    if headroom is None:
        return text
    return f"{text}, {format_bytes(abs(headroom))} {'to spare' if headroom >= 0 else 'too much'}"
