"""
What the viewer at pytorch.org/memory_viz asks of a file (`torch/utils/viz/MemoryViz.js`), stated anew.

It draws the history of the allocator from the final segments and the trace, and shows nothing at all where the two
contradict each other.
"""

from __future__ import annotations

import pickletools
from typing import Any

OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "EMPTY_DICT",
    "EMPTY_LIST", "EMPTY_TUPLE", "DICT", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM",
    "SETITEMS", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE",
    "BINUNICODE",
}  # fmt: skip
"""The opcodes that its unpickler knows; any other is an error."""

Range = tuple[int, int]
"""Address and bytes."""


def unreadable_opcodes(data: bytes) -> set[str]:
    """The opcodes of a pickle that the viewer stops at."""
    return {opcode.name for opcode, _, _ in pickletools.genops(data)} - OPCODES


def follow_trace(trace: list[dict[str, Any]]) -> tuple[list[Range], dict[int, int]]:
    """
    Memory of the driver and live storages after a trace that starts from nothing.

    AssertionError where an entry is impossible: a storage outside of memory or over another, or a free of what is not
    there.
    """
    memory: set[Range] = set()
    live: dict[int, int] = {}
    now = -1
    pending = None
    for entry in trace:
        assert entry["time_us"] > now
        now = entry["time_us"]
        assert pending is None or (entry["action"], entry["addr"]) == ("free_completed", pending)
        action, size = entry["action"], entry["size"]
        if action == "oom":
            continue
        address = entry["addr"]
        if action == "alloc":
            assert any(start <= address and address + size <= start + length for start, length in memory)
            assert not overlaps(address, size, live.items())
            live[address] = size
        elif action == "free_requested":
            assert live[address] == size
            pending = address
        elif action == "free_completed":
            assert live.pop(address) == size
            pending = None
        elif action in ("segment_alloc", "segment_map"):
            assert not overlaps(address, size, memory)
            memory = (
                joined({*memory, (address, size)}) if action == "segment_map" else {*memory, (address, size)}
            )
        else:
            assert action in ("segment_free", "segment_unmap"), action
            assert not overlaps(address, size, live.items())
            [(start, length)] = [piece for piece in memory if overlaps(address, size, [piece])]
            memory.remove((start, length))
            if action == "segment_free":
                assert (start, length) == (address, size)
            else:
                assert start <= address and address + size <= start + length
                rest = [(start, address - start), (address + size, start + length - address - size)]
                memory |= {piece for piece in rest if piece[1]}
    return sorted(memory), live


def overlaps(address: int, size: int, ranges: Any) -> bool:
    """Whether a range has an address in common with one of these."""
    return any(start < address + size and address < start + length for start, length in ranges)


def joined(ranges: set[Range]) -> set[Range]:
    """Ranges that touch are one."""
    result: list[Range] = []
    for start, length in sorted(ranges):
        if result and sum(result[-1]) == start:
            result[-1] = (result[-1][0], result[-1][1] + length)
        else:
            result.append((start, length))
    return set(result)
