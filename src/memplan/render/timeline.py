"""The live bytes of a tape over its phases, drawn with characters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from memplan.render.screen import gib

Point = tuple[str, int, int]
"""(phase, step, live bytes)"""

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:#"
_SHORT = {"load": "load", "forward": "fwd", "backward": "bwd", "optimizer_step": "opt", "evaluation": "eval"}
_LABEL_COLUMNS = 10


def draw_timeline(
    points: Sequence[Point],
    *,
    width: int,
    height: int = 7,
    unicode: bool = True,
    limit_bytes: int | None = None,
) -> list[str]:
    """
    Lines of at most `width` characters: a chart `height` rows high, its axis, and the names of phases and
    steps.

    Each column shows the largest value of its stretch. `limit_bytes` (what the card leaves for tensors) is
    drawn as a line of dashes where it is in reach; further up it would flatten the curve.
    """
    if not points:
        return []
    chart_columns = width - _LABEL_COLUMNS
    stretches = _stretches(len(points), chart_columns)
    heights = [max(points[index][2] for index in stretch) for stretch in stretches]
    peak_bytes = max(heights)
    limit = limit_bytes if limit_bytes is not None and in_reach(points, limit_bytes) else None
    top_bytes = max(peak_bytes, limit or 0)
    limit_row = None if limit is None else _row_of(limit, top_bytes, height)

    lines = [
        _label(row, height, top_bytes, limit if row == limit_row else None, unicode)
        + _row(heights, row, height, top_bytes, unicode, is_limit=row == limit_row)
        for row in reversed(range(height))
    ]
    lines.append(
        " " * (_LABEL_COLUMNS - 1) + ("└" + "─" * chart_columns if unicode else "+" + "-" * chart_columns)
    )
    starts = {stretch.start: column for column, stretch in reversed(list(enumerate(stretches)))}
    lines.append(_names(points, starts, stretches, chart_columns, by_phase=True))
    lines.append(_names(points, starts, stretches, chart_columns, by_phase=False))
    return [line.rstrip() for line in lines]


def in_reach(points: Sequence[Point], limit_bytes: int) -> bool:
    """Whether a limit is drawn: where it is within twice the peak."""
    return 0 < limit_bytes <= 2 * max((point[2] for point in points), default=0)


def _stretches(num_points: int, num_columns: int) -> list[range]:
    """
    One range of point indices per column, never empty; columns share points when there are more of them.
    """
    return [
        range(
            column * num_points // num_columns,
            max((column + 1) * num_points // num_columns, column * num_points // num_columns + 1),
        )
        for column in range(num_columns)
    ]


def _row_of(num_bytes: int, top_bytes: int, height: int) -> int:
    return min(num_bytes * height // max(top_bytes, 1), height - 1)


def _label(row: int, height: int, top_bytes: int, limit_bytes: int | None, unicode: bool) -> str:
    if limit_bytes is not None:
        text = gib(limit_bytes)
    elif row == height - 1:
        text = gib(top_bytes)
    elif row == 0:
        text = "0"
    else:
        text = ""
    mark = ("┤" if text else "│") if unicode else "|"
    return text.rjust(_LABEL_COLUMNS - 2) + " " + mark


def _row(
    heights: Sequence[int], row: int, height: int, top_bytes: int, unicode: bool, *, is_limit: bool
) -> str:
    levels = _BLOCKS if unicode else _ASCII
    full = len(levels) - 1
    cells = []
    for num_bytes in heights:
        filled = num_bytes * height * full // max(top_bytes, 1) - row * full
        level = min(max(filled, 0), full)
        if num_bytes and row == 0 and level == 0:
            level = 1
        cells.append("-" if is_limit and level == 0 else levels[level])
    return "".join(cells)


def _names(
    points: Sequence[Point],
    starts: dict[int, int],
    stretches: list[range],
    num_columns: int,
    *,
    by_phase: bool,
) -> str:
    """Names under the axis, each at the column where its stretch begins; a name without room is left out."""
    line = [" "] * (_LABEL_COLUMNS + num_columns)
    free = 0
    spans = _spans(points, by_phase=by_phase)
    columns = [_column(start, starts, stretches) for _, start in spans] + [num_columns]
    for (name, _), column, following in zip(spans, columns, columns[1:]):
        if column >= free and len(name) < following - column + (following == num_columns):
            line[_LABEL_COLUMNS + column : _LABEL_COLUMNS + column + len(name)] = name
            free = column + len(name) + 1
    return "".join(line)


def _spans(points: Sequence[Point], *, by_phase: bool) -> list[tuple[str, int]]:
    """(name, index of its first point) of each run of one phase, or of one step."""
    spans = []
    index = 0
    for (phase, step), run in groupby(points, key=lambda point: (point[0] if by_phase else "", point[1])):
        name = _SHORT.get(phase, phase) if by_phase else (f"step {step}" if step else "")
        spans.append((name, index))
        index += sum(1 for _ in run)
    return spans


def _column(point: int, starts: dict[int, int], stretches: list[range]) -> int:
    if point in starts:
        return starts[point]
    return next(column for column, stretch in enumerate(stretches) if point in stretch)
