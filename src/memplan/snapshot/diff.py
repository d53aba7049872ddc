"""Two tapes at their peaks: what is alive in both, and what is not."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from memplan.allocator import block_bytes, replay
from memplan.budget.alive import snapshots
from memplan.job.spec import AllocatorSettings
from memplan.snapshot.frames import UNKNOWN
from memplan.tape.tape import Storage, WrittenTape

_NUMBER = re.compile(r"(?<=\.)\d+(?=[. ]|$)")


@dataclass(frozen=True)
class TensorChange:
    """
    Tensors of one name that are not the same on both sides: `count` of them, each of `shape` and `dtype`.

    Where a tensor is on one side alone, the other side has count 0.
    """

    where: str
    """Numbers of blocks are `*`: what happens to every block is one change."""
    category: str
    """That of B; that of A where B has none."""
    a_shape: tuple[int, ...] | None
    b_shape: tuple[int, ...] | None
    a_dtype: str | None
    b_dtype: str | None
    a_count: int
    b_count: int
    a_bytes: int
    """Of all of them."""
    b_bytes: int

    @property
    def change_bytes(self) -> int:
        """What B holds more than A."""
        return self.b_bytes - self.a_bytes


@dataclass(frozen=True)
class TapeDiff:
    """What is alive at the peak of each of two tapes, the largest differences first."""

    alike_bytes: int
    alike_count: int
    alike_by_size: int
    """How many of them have only their size in common, since one side is a recording."""
    alike_by_category: dict[str, int]
    """
    Bytes of the blocks of what is alike, by the category that a plan on either side gives it: what a recording holds,
    as far as the plan explains it.
    """
    changes: tuple[TensorChange, ...]


def diff_tapes(
    a: WrittenTape,
    b: WrittenTape,
    *,
    settings_a: AllocatorSettings | None = None,
    settings_b: AllocatorSettings | None = None,
) -> TapeDiff:
    """
    Compare what is alive at the peaks of two tapes.

    Tensors are alike if name and size are the same, each counted as often as it occurs; of the others, those of one
    name are changes, of the same shape first. Where one side is a recording, whose names are lines of code, tensors of
    the same size are then alike too. The rest is on one side alone. The changes add up to the difference of the bytes
    that are alive.
    """
    left, right = _at_peak(a, settings_a), _at_peak(b, settings_b)
    alike = [
        *_pair(left, right, lambda storage: (storage.where, storage.shape, storage.num_bytes)),
        *_pair(left, right, lambda storage: (storage.where, storage.num_bytes)),
    ]
    changed = [
        *_pair(left, right, lambda storage: (storage.where, storage.shape)),
        *_pair(left, right, lambda storage: storage.where),
    ]
    by_size = []
    if any(storage.category == "unknown" for storage in (*left, *right)):
        by_size = _pair(left, right, lambda storage: storage.num_bytes, nameless=True)
    categories: Counter[str] = Counter()
    for one, other in (*alike, *by_size):
        category = other.category if one.category == "unknown" else one.category
        categories[category] += block_bytes(one.num_bytes)
    return TapeDiff(
        alike_by_category=dict(categories),
        alike_bytes=sum(storage.num_bytes for storage, _ in (*alike, *by_size)),
        alike_count=len(alike) + len(by_size),
        alike_by_size=len(by_size),
        changes=_changes([*changed, *((one, None) for one in left), *((None, one) for one in right)]),
    )


def _at_peak(written: WrittenTape, settings: AllocatorSettings | None) -> list[Storage]:
    """What is alive when the most is allocated, largest first."""
    tape = written.flatten()
    peak = replay(tape.events, tape.sizes, tape.streams, settings or AllocatorSettings())
    [state] = snapshots(tape, written, [peak.peak_allocated_event], 1)
    return [written.describe(storage_id) for storage_id in state.largest(len(state.ids))]


def _pair(
    left: list[Storage],
    right: list[Storage],
    key: Callable[[Storage], Hashable],
    *,
    nameless: bool = False,
) -> list[tuple[Storage, Storage]]:
    """Take pairs of one key out of both lists, in their order; those without a name only if `nameless`."""
    waiting: dict[Hashable, list[Storage]] = defaultdict(list)
    for storage in reversed(right):
        if nameless or storage.where != UNKNOWN:
            waiting[key(storage)].append(storage)
    pairs, rest = [], []
    for storage in left:
        found = waiting.get(key(storage)) if nameless or storage.where != UNKNOWN else None
        if found:
            pairs.append((storage, found.pop()))
        else:
            rest.append(storage)
    taken = {id(storage) for _, storage in pairs}
    left[:] = rest
    right[:] = [storage for storage in right if id(storage) not in taken]
    return pairs


def _changes(pairs: Iterable[tuple[Storage | None, Storage | None]]) -> tuple[TensorChange, ...]:
    counts: Counter[tuple[Any, ...]] = Counter()
    for a, b in pairs:
        known = b or a
        assert known is not None
        shapes = (a.shape if a else None, b.shape if b else None)
        dtypes = (a.dtype if a else None, b.dtype if b else None)
        sizes = (a.num_bytes if a else None, b.num_bytes if b else None)
        counts[(_NUMBER.sub("*", known.where), known.category, *shapes, *dtypes, *sizes)] += 1
    changes = [
        TensorChange(
            where,
            category,
            a_shape,
            b_shape,
            a_dtype,
            b_dtype,
            a_count=0 if size_a is None else count,
            b_count=0 if size_b is None else count,
            a_bytes=(size_a or 0) * count,
            b_bytes=(size_b or 0) * count,
        )
        for (where, category, a_shape, b_shape, a_dtype, b_dtype, size_a, size_b), count in counts.items()
    ]
    return tuple(sorted(changes, key=lambda change: (-abs(change.change_bytes), change.where)))
