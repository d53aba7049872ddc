"""
A memory snapshot as a tape: one that torch recorded, or one that memplan wrote.

A recording is a ring buffer: it begins when recording was switched on, or as far back as its entries reach. What was
alive by then is in no `alloc` of it; it follows from the segments at the end, and from frees of unknown addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memplan.errors import SnapshotError
from memplan.job.spec import AllocatorSettings
from memplan.snapshot.frames import UNKNOWN, name_of, parse_moment, planned_storage
from memplan.snapshot.pickles import Fields, load_plain
from memplan.snapshot.write import FORMAT
from memplan.tape.tape import CATEGORIES, FlatTape, Mark, Storage, Tape
from memplan.units import MiB, format_bytes

RECORDED_PHASE = "trace"
"""The phase of what was recorded, where nobody said which phases it has."""

_ACTIVE = ("active_allocated", "active_pending_free", "active_awaiting_free")


@dataclass(frozen=True)
class RecordedTape(FlatTape):
    """A tape that was read, with what else the snapshot says."""

    device: int
    settings: AllocatorSettings
    reserved: tuple[tuple[int, int], ...]
    """(number of events before, reserved bytes from then on): what the segments came to, in order."""
    planned: bool
    """Whether memplan wrote it; the storages then have their categories."""
    notes: tuple[str, ...] = ()

    def reserved_peak(self, start: int, stop: int) -> int:
        """The highest reserved bytes from event `start` up to but without event `stop`."""
        before = [num_bytes for event, num_bytes in self.reserved if event < start][-1:]
        inside = [num_bytes for event, num_bytes in self.reserved if start <= event < stop]
        return max([*before, *inside])


def read_snapshot(path: str | Path, *, device: int | None = None) -> RecordedTape:
    """
    The tape of one device of a snapshot: of the fullest if it is not named.

    Storages that were alive when the recording begins are allocated in the phase `load`, in the order of their
    addresses as far as they live to the end. Then follows the phase `trace`, or the phases that
    `torch.cuda.memory._set_memory_metadata("forward of step 1")` named during the run. A storage is freed where its
    memory can be used again (`free_completed`). Categories are those of memplan's own files, else `unknown`.

    Raises:
        SnapshotError: there is no such file or device, it is damaged, or it holds anything but plain data.
    """
    path = Path(path)
    return tape_of(load_plain(path), device=device, source=str(path))


def tape_of(snapshot: Any, *, device: int | None = None, source: str = "snapshot") -> RecordedTape:
    """As `read_snapshot`, of what `torch.cuda.memory._snapshot()` returns."""
    fields = Fields(source)
    if isinstance(snapshot, list):  # torch wrote the segments alone at first, and its tools still read that
        snapshot = {"segments": snapshot}
    if not isinstance(snapshot, Mapping) or "segments" not in snapshot:
        raise fields.error("it has no `segments`")
    segments = list(fields.dicts(snapshot["segments"], "segments"))
    traces = snapshot.get("device_traces") or []
    if not isinstance(traces, (list, tuple)) or not all(isinstance(trace, (list, tuple)) for trace in traces):
        raise fields.error("`device_traces` is no list of traces")
    devices = sorted(
        {fields.number(segment, "device", default=0) for segment in segments}
        | {number for number, trace in enumerate(traces) if trace}
    )
    chosen, notes = _choose(devices, device, segments, traces, fields)
    trace = list(fields.dicts(traces[chosen], "device_traces")) if 0 <= chosen < len(traces) else []
    own = [segment for segment in segments if fields.number(segment, "device", default=0) == chosen]
    marks = _own_marks(snapshot, fields)
    reader = _Reader(fields, planned=marks is not None)
    reader.follow(trace)
    reader.finish(own)
    return reader.tape(chosen, marks, _settings(snapshot.get("allocator_settings")), notes)


def _choose(
    devices: Sequence[int],
    asked: int | None,
    segments: Sequence[Mapping[str, Any]],
    traces: Sequence[Any],
    fields: Fields,
) -> tuple[int, list[str]]:
    """The device to read, and what to say about that."""
    if asked is not None:
        if asked not in devices:
            there = ", ".join(map(str, devices)) or "none"
            raise SnapshotError(
                f"`{fields.source}` holds nothing of device {asked}", hint=f"devices in it: {there}"
            )
        return asked, []
    if not devices:
        return 0, []

    def fullness(device: int) -> tuple[int, int, int]:
        reserved = sum(
            fields.size(segment, "total_size")
            for segment in segments
            if fields.number(segment, "device", default=0) == device
        )
        return reserved, len(traces[device]) if device < len(traces) else 0, -device

    chosen = max(devices, key=fullness)
    if len(devices) == 1:
        return chosen, []
    return chosen, [f"device {chosen}, the fullest of {', '.join(map(str, devices))}"]


@dataclass(eq=False)
class _Record:
    """One storage on its way; `allocated` says whether `frames` are those of its allocation."""

    num_bytes: int
    stream: int
    frames: Sequence[Mapping[str, Any]]
    allocated: bool = True
    category: Any = None
    id: int = field(default=0)


class _Reader:
    """Follows a trace forwards; `initial` collects what must have been there before."""

    def __init__(self, fields: Fields, *, planned: bool) -> None:
        self.fields = fields
        self.planned = planned
        self.initial: list[_Record] = []
        self.moves: list[tuple[bool, _Record]] = []
        self.live: dict[int, _Record] = {}
        self.moments: list[tuple[int, str]] = []
        """(number of moves before it, phase and step as text)"""
        self.growth: list[tuple[int, int]] = [(0, 0)]
        """(number of moves before it, reserved bytes since the beginning)"""
        self.reserved_at_end = 0
        self.notes: list[str] = []

    def follow(self, trace: Sequence[Mapping[str, Any]]) -> None:
        fields = self.fields
        moment = ""
        for entry in trace:
            metadata = entry.get("user_metadata")
            if isinstance(metadata, str) and metadata and metadata != moment:
                moment = metadata
                self.moments.append((len(self.moves), moment))
            action = entry.get("action")
            if action == "alloc":
                self._alloc(entry)
            elif action == "free_requested":
                # The memory is in use until `free_completed`: another stream may still read it.
                self._at(entry)
            elif action == "free_completed":
                record = self._at(entry)
                if record is not None:
                    del self.live[fields.number(entry, "addr")]
                    self.moves.append((False, record))
            elif action in ("segment_alloc", "segment_map"):
                self._grow(fields.size(entry, "size"))
            elif action in ("segment_free", "segment_unmap"):
                self._grow(-fields.size(entry, "size"))
            elif action == "oom":
                asked, left = fields.size(entry, "size"), fields.size(entry, "device_free", "addr", default=0)
                self.notes.append(
                    f"the run was out of memory: {format_bytes(asked)} were asked for, and the GPU had "
                    f"{format_bytes(left)} left"
                )

    def _alloc(self, entry: Mapping[str, Any]) -> None:
        address, size = self.fields.number(entry, "addr"), self.fields.size(entry, "size")
        if not size:
            return
        before = self.live.pop(address, None)
        if before is not None:  # its free was not recorded, but nothing can be where something is
            self.moves.append((False, before))
        record = _Record(size, self._stream(entry), self._frames(entry), category=entry.get("category"))
        self.live[address] = record
        self.moves.append((True, record))

    def _at(self, entry: Mapping[str, Any]) -> _Record | None:
        """What an entry frees; it was there from the beginning if nothing was allocated at its address."""
        address, size = self.fields.number(entry, "addr"), self.fields.size(entry, "size")
        if address not in self.live and size:
            record = _Record(size, self._stream(entry), self._frames(entry), allocated=self.planned)
            self.live[address] = record
            self.initial.append(record)
        return self.live.get(address)

    def _grow(self, num_bytes: int) -> None:
        self.growth.append((len(self.moves), self.growth[-1][1] + num_bytes))

    def finish(self, segments: Sequence[Mapping[str, Any]]) -> None:
        """Add what is in the segments and in no event; free what has gone without one."""
        fields = self.fields
        untouched: list[tuple[int, _Record]] = []
        alive = set()
        for segment in segments:
            self.reserved_at_end += fields.size(segment, "total_size")
            address = fields.number(segment, "address", default=0)
            for block in fields.dicts(segment.get("blocks") or [], "blocks"):
                place = fields.number(block, "address", default=address)
                address += fields.size(block, "size")
                if block.get("state") not in _ACTIVE:
                    continue
                alive.add(place)
                size = fields.size(block, "requested_size", "size")
                if place not in self.live and size:
                    record = _Record(size, self._stream(segment), self._frames(block))
                    untouched.append((place, record))
        if segments:
            gone = [record for address, record in self.live.items() if address not in alive]
            self.moves += [(False, record) for record in gone]
        self.initial += [record for _, record in sorted(untouched, key=lambda pair: pair[0])]

    def _stream(self, entry: Mapping[str, Any]) -> int:
        return self.fields.number(entry, "stream", default=0)

    def _frames(self, entry: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        frames = entry.get("frames")
        if frames is None and isinstance(entry.get("history"), list) and entry["history"]:
            [newest, *_] = self.fields.dicts(entry["history"], "history")
            frames = newest.get("frames")
        return list(self.fields.dicts(frames or [], "frames"))

    def tape(
        self, device: int, marks: list[Mark] | None, settings: AllocatorSettings, notes: Sequence[str]
    ) -> RecordedTape:
        """Number the storages in the order of their allocation, and put the phases in their places."""
        moves = [*((True, record) for record in self.initial), *self.moves]
        tape = Tape([], [0], [])
        storages = []
        for allocates, record in moves:
            if allocates:
                record.id = len(tape.sizes)
                tape.sizes.append(record.num_bytes)
                storages.append(self._storage(record))
                if record.stream:
                    tape.streams[record.id] = record.stream
            tape.events.append(record.id if allocates else -record.id)
        tape.marks = self._marks() if marks is None else marks
        places = [0, *(mark.event for mark in tape.marks), len(tape.events)]
        if places != sorted(places):
            raise self.fields.error("`marks` are out of order")
        if self.initial and not self.planned:
            total = sum(record.num_bytes for record in self.initial)
            self.notes.insert(
                0,
                f"{len(self.initial):,} allocations, {format_bytes(total)}, are older than the recording "
                "and count as loaded",
            )
        return RecordedTape(
            tape=tape,
            storages=storages,
            device=device,
            settings=settings,
            reserved=self._reserved(),
            planned=self.planned,
            notes=(*notes, *self.notes),
        )

    def _storage(self, record: _Record) -> Storage:
        if self.planned:
            storage = planned_storage(record.frames, record.num_bytes)
            if storage is not None and storage.category in CATEGORIES:
                return storage
        category = record.category if record.category in CATEGORIES else "unknown"
        where = name_of(record.frames) if record.allocated else UNKNOWN
        return Storage(record.num_bytes, category, where, None, None)

    def _marks(self) -> list[Mark]:
        """Loading, then the phases that were named while recording, or one for all of it."""
        first = len(self.initial)
        marks = [Mark(0, "load", 0)] if first else []
        if self.moves and (not self.moments or self.moments[0][0] > 0):
            marks.append(Mark(first, RECORDED_PHASE, 0))
        for move, text in self.moments:
            marks.append(Mark(first + move, *parse_moment(text)))
        marks.append(Mark(first + len(self.moves), "end", marks[-1].step if marks else 0))
        return marks

    def _reserved(self) -> tuple[tuple[int, int], ...]:
        """What was there before the trace is what is there at the end, less what the trace says was added."""
        first = len(self.initial)
        before = self.reserved_at_end - self.growth[-1][1]
        later = [(first + move, before + num_bytes) for move, num_bytes in self.growth[1:]]
        return ((0, before), *later)


def _own_marks(snapshot: Mapping[str, Any], fields: Fields) -> list[Mark] | None:
    """The marks of a file that memplan wrote; None for others."""
    own = snapshot.get("memplan")
    if own is None:
        return None
    if not isinstance(own, Mapping) or own.get("format") != FORMAT:
        raise SnapshotError(
            f"`{fields.source}` was written by another version of memplan",
            hint="write it again with this one",
        )
    marks = []
    for item in own.get("marks") or []:
        match item:
            case [int(event), str(phase), int(step)] if event >= 0:
                marks.append(Mark(event, phase, step))
            case _:
                raise fields.error("`marks` holds something else than events, phases and steps")
    return marks


def _settings(found: Any) -> AllocatorSettings:
    """The settings that the snapshot records, as far as memplan knows them."""
    if not isinstance(found, Mapping):
        return AllocatorSettings(expandable_segments=False)
    max_split = found.get("max_split_size")
    threshold = found.get("garbage_collection_threshold")
    divisions = found.get("roundup_power2_divisions")
    values = set(divisions.values()) if isinstance(divisions, Mapping) else set()
    [division] = values if len(values) == 1 else [None]
    return AllocatorSettings(
        expandable_segments=bool(found.get("expandable_segments")),
        max_split_size_mb=max_split // MiB
        if isinstance(max_split, int) and 20 * MiB <= max_split < 1 << 50
        else None,
        garbage_collection_threshold=threshold
        if isinstance(threshold, float) and 0 < threshold < 1
        else None,
        roundup_power2_divisions=division if isinstance(division, int) and division > 1 else None,
    )
