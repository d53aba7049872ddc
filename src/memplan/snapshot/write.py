"""
A tape as the memory snapshot that https://pytorch.org/memory_viz opens.

The format is that of `torch.cuda.memory._snapshot()`: `_memory_snapshot_pickled` in
`torch/csrc/cuda/memory_snapshot.cpp`, and what `torch/utils/viz/MemoryViz.js` and `torch/cuda/_memory_viz.py`
make of it. The viewer replays the trace backwards from the final segments, so the two have to agree.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from bisect import bisect_right
from pathlib import Path
from typing import Any

from memplan.errors import SnapshotError
from memplan.job.spec import AllocatorSettings
from memplan.preflight.environment import settings_string
from memplan.snapshot.frames import Frame, moment, storage_frames
from memplan.snapshot.placement import Action, PlacedSegment, place
from memplan.tape.tape import Mark, Tape, WrittenTape
from memplan.units import MiB

FORMAT = 1
"""Of the entry `memplan`, which holds what a snapshot of torch has no place for."""

PICKLE_PROTOCOL = 4
"""The viewer refuses protocol 5, the default of Python 3.14."""


def write_snapshot(
    written: WrittenTape,
    path: str | Path,
    settings: AllocatorSettings | None = None,
    *,
    limit_bytes: int | None = None,
    overwrite: bool = False,
) -> None:
    """
    Write a tape as a snapshot of PyTorch's caching allocator, whole or not at all.

    Args:
        settings: those of the allocator that the tape goes through; memplan's defaults without them.
        limit_bytes: what the driver can give (None: without end). Where it is not enough, the trace ends with `oom`.
        overwrite: replace a file that is there.

    Raises:
        SnapshotError: the file is there already, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise SnapshotError(
            f"`{path}` exists already", hint="write to another name, or remove that file first"
        )
    data = pickle.dumps(
        snapshot_of(written, settings or AllocatorSettings(), limit_bytes=limit_bytes), PICKLE_PROTOCOL
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise SnapshotError(f"`{path}` cannot be written: {error.strerror or error}") from error


def snapshot_of(
    written: WrittenTape, settings: AllocatorSettings, *, limit_bytes: int | None = None
) -> dict[str, Any]:
    """
    The snapshot as plain dicts, lists, tuples, strings, ints, floats and bools.

    Frames name the tensor, its category and its phase. `user_metadata` of every event is the phase too. Storages of
    no bytes are left out, as torch leaves them out.
    """
    tape = written.flatten()
    placement = place(tape, settings, limit_bytes=limit_bytes)
    writer = _Writer(written, tape)
    trace = [entry for action in placement.actions for entry in writer.entries(action)]
    return {
        "segments": [writer.segment(segment, settings) for segment in placement.segments],
        "device_traces": [trace],
        "allocator_settings": _settings(settings),
        "external_annotations": [],
        "memplan": {"format": FORMAT, "marks": _marks(tape, placement.actions)},
    }


class _Writer:
    """Entries of one tape; equal frames are the same object, so that the pickle holds them once."""

    def __init__(self, written: WrittenTape, tape: Tape) -> None:
        self.written = written
        self.categories = written.categories()
        self.marks = tape.marks
        self.starts = [mark.event for mark in tape.marks]
        self.moments = ["", *map(moment, tape.marks)]
        self.sizes = tape.sizes
        self.frames: dict[int, list[Frame]] = {}
        self.now_us = 0

    def entries(self, action: Action) -> list[dict[str, Any]]:
        """An action as trace entries, each a dict of its own: the viewer writes into them."""
        if action.kind == "free":
            kinds = ["free_requested", "free_completed"]  # adjacent, which the viewer takes for one free
        else:
            kinds = [action.kind]
        return [self._entry(kind, action) for kind in kinds]

    def _entry(self, kind: str, action: Action) -> dict[str, Any]:
        self.now_us += 1
        number = bisect_right(self.starts, action.event)
        mark = self.marks[number - 1] if number else None
        if action.storage:
            category = self.categories[action.storage]
            frames = self._frames(action.storage, mark)
        else:
            # The viewer fails to load a file in which events have categories and none of them is `unknown`.
            category = "unknown"
            frames = _segment_frames(action.stream)
        entry = {
            "action": kind,
            "device_free" if kind == "oom" else "addr": action.address,
            "size": action.num_bytes,
            "stream": action.stream,
            "time_us": self.now_us,
            "compile_context": "N/A",
            "user_metadata": self.moments[number],
            "pool_id": (0, 0),
            "frames": frames,
        }
        if kind.startswith(("alloc", "segment")):
            entry["category"] = category
        return entry

    def _frames(self, storage: int, mark: Mark | None) -> list[Frame]:
        if storage not in self.frames:
            self.frames[storage] = storage_frames(self.written.describe(storage), mark)
        return self.frames[storage]

    def segment(self, segment: PlacedSegment, settings: AllocatorSettings) -> dict[str, Any]:
        """A segment and its blocks, which fill it without a gap."""
        live = [block for block in segment.blocks if block.storage]
        allocated = sum(block.num_bytes for block in live)
        return {
            "device": 0,
            "address": segment.address,
            "total_size": segment.num_bytes,
            "allocated_size": allocated,
            "active_size": allocated,
            "requested_size": sum(self.sizes[block.storage] for block in live),
            "stream": segment.stream,
            "segment_type": "small" if segment.small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": settings.expandable_segments,
            "frames": _segment_frames(segment.stream),
            "blocks": [
                {
                    "address": block.address,
                    "size": block.num_bytes,
                    "requested_size": self.sizes[block.storage] if block.storage else 0,
                    "state": "active_allocated" if block.storage else "inactive",
                    "frames": self.frames[block.storage] if block.storage else [],
                }
                for block in segment.blocks
            ],
        }


def _segment_frames(stream: int) -> list[Frame]:
    return [{"filename": "stream", "line": stream, "name": "segment of the allocator"}]


def _marks(tape: Tape, actions: list[Action]) -> list[list[Any]]:
    """[event, phase, step] of each mark, events counted as the trace has them, up to its end."""
    events = [action.event for action in actions if action.kind in ("alloc", "free")]
    ends_early = bool(actions) and actions[-1].kind == "oom"
    return [
        [bisect_right(events, mark.event - 1), mark.phase, mark.step]
        for mark in tape.marks
        if not ends_early or mark.event <= actions[-1].event
    ]


def _settings(settings: AllocatorSettings) -> dict[str, Any]:
    divisions = settings.roundup_power2_divisions or 0
    max_split = settings.max_split_size_mb
    return {
        "PYTORCH_CUDA_ALLOC_CONF": settings_string(settings),
        "max_split_size": -1 if max_split is None else max_split * MiB,
        "garbage_collection_threshold": settings.garbage_collection_threshold or 0.0,
        "expandable_segments": settings.expandable_segments,
        "pinned_num_register_threads": 1,
        "release_lock_on_cudamalloc": False,
        "pinned_use_cuda_host_register": False,
        "roundup_power2_divisions": {str(2**power): divisions for power in range(16)},
    }
