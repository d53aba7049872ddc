"""
A screen of text, laid out once and printed with or without colour.

Every renderer for people writes lines of segments: plain strings, or `(text, style)` pairs in rich's style
names. The text alone must say everything; styles only help the eye. rich is imported when a terminal that
takes colour is there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import TextIO

from memplan.units import GiB

Segment = str | tuple[str, str]

MIN_WIDTH, MAX_WIDTH = 80, 100


class Screen:
    """
    Lines of segments for one output, `width` columns wide; `unicode` says whether block characters can be
    shown.
    """

    def __init__(self, width: int = MAX_WIDTH, *, unicode: bool = True) -> None:
        self.width = width
        self.unicode = unicode
        self.lines: list[tuple[Segment, ...]] = []

    def line(self, *segments: Segment) -> None:
        """Add one line; without segments, an empty one."""
        self.lines.append(segments)

    def plain(self) -> str:
        """The text without styles, without trailing blanks, ending in one newline."""
        rows = ["".join(_text(segment) for segment in line).rstrip() for line in self.lines]
        return "\n".join(rows).rstrip("\n") + "\n"

    def coloured(self, file: TextIO) -> None:
        """Print through rich, which decides how many colours the terminal behind `file` has."""
        from rich.console import Console
        from rich.text import Text

        console = Console(file=file, width=self.width, highlight=False, soft_wrap=True)
        for line in self.lines:
            console.print(Text.assemble(*line))


def screen_for(file: TextIO) -> Screen:
    """
    A screen as wide as the terminal behind `file` (80 to 100 columns; 100 when it is none) and as rich as its
    encoding.
    """
    columns = shutil.get_terminal_size((MAX_WIDTH, 24)).columns
    return Screen(min(max(columns, MIN_WIDTH), MAX_WIDTH), unicode=can_encode(file, "█▁┤·"))


def can_encode(file: TextIO, text: str) -> bool:
    """Whether `file` can carry `text`; a file without an encoding (a string buffer) can."""
    try:
        text.encode(getattr(file, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def wants_colour(file: TextIO) -> bool:
    """Colour only on a terminal, and not where NO_COLOR or TERM=dumb ask for none."""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def gib(num_bytes: int) -> str:
    """
    A number for a column headed GiB; what is there but rounds to nothing is told apart from nothing.

    >>> gib(3 * GiB // 2), gib(1), gib(0)
    ('1.50', '<0.01', '-')
    """
    if num_bytes == 0:
        return "-"
    text = f"{num_bytes / GiB:,.2f}"
    return "<0.01" if text == "0.00" else text


def clip(text: str, width: int) -> str:
    """
    `text` in at most `width` characters, the middle left out.

    >>> clip("model.layers.31.mlp.down_proj", 20)
    'model.lay..down_proj'
    """
    if len(text) <= width:
        return text
    tail = (width - 2) // 2
    head = width - 2 - tail
    return text[:head] + ".." + text[len(text) - tail :]


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), gap: int = 2) -> list[str]:
    """Rows of cells as aligned lines: columns in `right` are right-aligned, the others left-aligned."""
    if not rows:
        return []
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        (" " * gap)
        .join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        .rstrip()
        for row in rows
    ]


def _text(segment: Segment) -> str:
    return segment if isinstance(segment, str) else segment[0]
