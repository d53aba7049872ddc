"""
A tape in few bytes: the events of whole steps compress to a few kilobytes per thousand.

Events are written as distances: 0 allocates the next storage, k > 0 frees the storage that was allocated k
allocations ago. Equal blocks of a model then read equal, and gzip finds them.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any

from memplan.tape.tape import FlatTape, Mark, Storage, Tape

ENCODING = "distances, JSON, gzip, base64"


def encode(flat: FlatTape) -> dict[str, Any]:
    """The tape as a JSON object: what a reader wants to know at a glance, and the events in one string."""
    tape, storages = _in_order(flat)
    kinds: dict[tuple[Any, ...], int] = {}
    of_storage = [kinds.setdefault(_kind(storage), len(kinds)) for storage in storages]
    content = {
        "events": _distances(tape.events),
        "sizes": tape.sizes[1:],
        "streams": sorted(tape.streams.items()),
        "kinds": list(kinds),
        "kind": of_storage,
    }
    packed = gzip.compress(json.dumps(content, separators=(",", ":")).encode(), 9, mtime=0)
    return {
        "num_events": len(tape.events),
        "num_storages": len(storages),
        "marks": [[mark.event, mark.phase, mark.step] for mark in tape.marks],
        "encoding": ENCODING,
        "data": base64.b64encode(packed).decode("ascii"),
    }


def decode(encoded: dict[str, Any]) -> FlatTape:
    """
    The tape that `encode` was given, its storages numbered in the order of their allocation.

    Raises ValueError for another encoding or a damaged string.
    """
    if encoded["encoding"] != ENCODING:
        raise ValueError(f"unknown encoding `{encoded['encoding']}`")
    try:
        content = json.loads(gzip.decompress(base64.b64decode(encoded["data"])))
    except (OSError, EOFError) as error:
        raise ValueError(f"the events cannot be read: {error}") from error
    sizes: list[int] = content["sizes"]
    storages = []
    for size, kind in zip(sizes, content["kind"]):
        category, where, dtype, shape = content["kinds"][kind]
        storages.append(Storage(size, category, where, dtype, None if shape is None else tuple(shape)))
    tape = Tape(
        _events(content["events"]),
        [0, *sizes],
        [Mark(event, phase, step) for event, phase, step in encoded["marks"]],
        {int(storage): stream for storage, stream in content["streams"]},
    )
    return FlatTape(tape, storages)


def _kind(storage: Storage) -> tuple[Any, ...]:
    return (storage.category, storage.where, storage.dtype, storage.shape)


def _in_order(flat: FlatTape) -> tuple[Tape, list[Storage]]:
    """The same tape with ids 1, 2, ... in the order of allocation."""
    tape = flat.tape
    new_ids: dict[int, int] = {}
    events = []
    for event in tape.events:
        if event > 0:
            new_ids[event] = len(new_ids) + 1
            events.append(new_ids[event])
        else:
            events.append(-new_ids[-event])
    order = list(new_ids)
    sizes = [0, *(tape.sizes[old] for old in order)]
    streams = {new_ids[old]: stream for old, stream in tape.streams.items() if old in new_ids}
    return Tape(events, sizes, tape.marks, streams), [flat.storages[old - 1] for old in order]


def _distances(events: Sequence[int]) -> list[int]:
    count = 0
    distances = []
    for event in events:
        if event > 0:
            count += 1
            distances.append(0)
        else:
            distances.append(count + event + 1)
    return distances


def _events(distances: Sequence[int]) -> list[int]:
    count = 0
    events = []
    for distance in distances:
        if distance == 0:
            count += 1
            events.append(count)
        else:
            events.append(distance - 1 - count)
    return events
