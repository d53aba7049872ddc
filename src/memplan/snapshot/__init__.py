"""
Memory snapshots of PyTorch: a tape written as one, for https://pytorch.org/memory_viz, and one read as a tape.

Nothing here imports torch; a snapshot is plain dicts and lists in a pickle, and nothing else is ever read from one.
The names below are loaded on first use: every estimate asks `is_pickle`, and seldom for more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.exports import lazy_exports

if TYPE_CHECKING:
    from memplan.snapshot.diff import TapeDiff, TensorChange, diff_tapes
    from memplan.snapshot.pickles import is_pickle
    from memplan.snapshot.read import RecordedTape, read_snapshot, tape_of
    from memplan.snapshot.write import snapshot_of, write_snapshot

__all__ = [
    "RecordedTape",
    "TapeDiff",
    "TensorChange",
    "diff_tapes",
    "is_pickle",
    "read_snapshot",
    "snapshot_of",
    "tape_of",
    "write_snapshot",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "diff": ("TapeDiff", "TensorChange", "diff_tapes"),
        "pickles": ("is_pickle",),
        "read": ("RecordedTape", "read_snapshot", "tape_of"),
        "write": ("snapshot_of", "write_snapshot"),
    },
)
