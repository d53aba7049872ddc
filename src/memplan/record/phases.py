"""Phases of a tape: their peaks in live bytes, and where the last of them ends."""

from __future__ import annotations

from typing import Any

from memplan.tape.tape import FlatTape, Mark, Tape

END = "end"
"""The mark behind the last phase."""


def up_to_end(flat: FlatTape) -> FlatTape:
    """The tape up to its `end` mark, if it has one: what is freed from there on belongs to no phase."""
    tape = flat.tape
    end = next((mark for mark in tape.marks if mark.phase == END), None)
    if end is None:
        return flat
    events = tape.events[: end.event]
    count = sum(event > 0 for event in tape.events[end.event :])
    if count == 0:
        return FlatTape(Tape(events, tape.sizes, _until(tape.marks, end), tape.streams), flat.storages)
    kept = {abs(event) for event in events}
    last = max(kept, default=0)
    streams = {storage: stream for storage, stream in tape.streams.items() if storage in kept}
    return FlatTape(
        Tape(events, tape.sizes[: last + 1], _until(tape.marks, end), streams), flat.storages[:last]
    )


def _until(marks: list[Mark], end: Mark) -> list[Mark]:
    return marks[: marks.index(end) + 1]


def tape_phases(flat: FlatTape) -> list[dict[str, Any]]:
    """Peak and end of every phase of a tape, in live bytes, as a record holds them."""
    tape = flat.tape
    bounds = [*(mark.event for mark in tape.marks), len(tape.events)]
    live = sum(_change(tape, event) for event in tape.events[: bounds[0]])
    phases = []
    for mark, start, stop in zip(tape.marks, bounds, bounds[1:]):
        peak = live
        for event in tape.events[start:stop]:
            live += _change(tape, event)
            peak = max(peak, live)
        if mark.phase != END:
            phases.append(
                {
                    "phase": mark.phase,
                    "step": mark.step,
                    "allocated_peak_bytes": peak,
                    "reserved_peak_bytes": None,
                    "allocated_bytes": live,
                    "reserved_bytes": None,
                }
            )
    return phases


def alive_at_peaks(flat: FlatTape) -> dict[tuple[str, int], set[int]]:
    """The ids alive at the highest moment of each phase and step; the first of equal moments."""
    tape = flat.tape
    bounds = [*(mark.event for mark in tape.marks), len(tape.events)]
    alive: set[int] = set()
    live = 0
    for event in tape.events[: bounds[0]]:
        live += _apply(tape, alive, event)
    highest: dict[tuple[str, int], tuple[int, set[int]]] = {}
    for mark, start, stop in zip(tape.marks, bounds, bounds[1:]):
        position, peak = _peak_position(tape, start, stop, live)
        for event in tape.events[start:position]:
            live += _apply(tape, alive, event)
        known = highest.get((mark.phase, mark.step))
        if mark.phase != END and (known is None or peak > known[0]):
            highest[mark.phase, mark.step] = (peak, set(alive))
        for event in tape.events[position:stop]:
            live += _apply(tape, alive, event)
    return {key: ids for key, (_, ids) in highest.items()}


def _peak_position(tape: Tape, start: int, stop: int, live: int) -> tuple[int, int]:
    """(index behind the event that makes the peak, its bytes)"""
    position, peak = start, live
    for index in range(start, stop):
        live += _change(tape, tape.events[index])
        if live > peak:
            position, peak = index + 1, live
    return position, peak


def _apply(tape: Tape, alive: set[int], event: int) -> int:
    (alive.add if event > 0 else alive.discard)(abs(event))
    return _change(tape, event)


def _change(tape: Tape, event: int) -> int:
    return tape.sizes[event] if event > 0 else -tape.sizes[-event]
