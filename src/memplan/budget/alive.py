"""What is alive at chosen moments of a tape, by category and by tensor, and the live bytes over time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import neg

from memplan.budget.result import Line
from memplan.tape.tape import CATEGORIES, Tape, WrittenTape

TIMELINE_POINTS = 240


class Snapshot:
    """The storages alive after one event."""

    def __init__(self, ids: set[int], by_category: dict[str, int], sizes: Sequence[int]) -> None:
        self.ids = ids
        self.by_category = by_category
        self.sizes = sizes

    def lines(self, allocated_bytes: int) -> tuple[Line, ...]:
        """
        Bytes by category, largest first; they sum to `allocated_bytes`. Blocks that were not split because
        little would have been left are larger than what they hold: that slack is counted as workspace.
        """
        slack = allocated_bytes - sum(self.by_category.values())
        lines = []
        for category, num_bytes in self.by_category.items():
            note = ""
            if category == "workspace" and slack:
                num_bytes, note = num_bytes + slack, f"of which {slack} bytes are slack of unsplit blocks"
            if num_bytes:
                lines.append(Line(category, num_bytes, note))
        return tuple(sorted(lines, key=lambda line: -line.bytes))

    def largest(self, count: int) -> list[int]:
        """Ids of the largest storages, largest first, in order of allocation where equal."""
        sizes = self.sizes
        return sorted(self.ids, key=lambda storage_id: (-sizes[storage_id], storage_id))[:count]


def snapshots(tape: Tape, written: WrittenTape, events: Sequence[int], unit: int) -> list[Snapshot]:
    """The state after each of these events (indices into the tape, in ascending order; -1: before all)."""
    categories = written.categories()
    sizes = tape.sizes
    alive: set[int] = set()
    before: set[int] = set()
    totals = dict.fromkeys(CATEGORIES, 0)
    is_allocation = (0).__lt__
    states = []
    start = 0
    for stop in events:
        stretch = tape.events[start : stop + 1]
        alive.update(filter(is_allocation, stretch))
        alive.difference_update(map(neg, stretch))
        for storage_id in alive - before:
            totals[categories[storage_id]] += -(-sizes[storage_id] // unit) * unit
        for storage_id in before - alive:
            totals[categories[storage_id]] -= -(-sizes[storage_id] // unit) * unit
        before = set(alive)
        states.append(Snapshot(before, dict(totals), sizes))
        start = stop + 1
    return states


def timeline(tape: Tape) -> tuple[tuple[str, int, int], ...]:
    """
    (phase, step, largest live bytes) of stretches of the tape: about TIMELINE_POINTS, at least one per phase.
    """
    changes = [*tape.sizes, *map(neg, reversed(tape.sizes[1:]))]
    live = list(accumulate(map(changes.__getitem__, tape.events)))
    stride = max(1, len(live) // TIMELINE_POINTS)
    points = []
    bounds = [mark.event for mark in tape.marks]
    for mark, start, stop in zip(tape.marks, bounds, bounds[1:]):
        for first in range(start, stop, stride):
            points.append((mark.phase, mark.step, max(live[first : min(first + stride, stop)])))
    return tuple(points)
