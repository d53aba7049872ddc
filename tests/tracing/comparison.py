"""A job's tape by the shape writer beside the trace of the real step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from installed import installed_behaviour
from memplan.allocator import replay_with_need
from memplan.job.spec import Job
from memplan.model import architecture_from_config
from memplan.tape.tape import WrittenTape
from memplan.tape.writer import write_tape
from memplan.tracing.writer import trace_job

BIG_BYTES = 2048
"""Smaller events are scalars, random states and positions: counted, but not compared one by one."""


@dataclass
class Comparison:
    """Both tapes of a job."""

    job: Job
    shape: WrittenTape
    trace: WrittenTape

    def events(self, written: WrittenTape) -> list[int]:
        """Signed bytes of the big events, in order."""
        tape = written.flatten()
        signed = [tape.sizes[event] if event > 0 else -tape.sizes[-event] for event in tape.events]
        return [num_bytes for num_bytes in signed if abs(num_bytes) >= BIG_BYTES]

    def lifetimes(self, written: WrittenTape) -> list[tuple[int, ...]]:
        """
        Of the big storages: bytes of one that is allocated, and the numbers of all that are freed before the next is.
        In what order those are freed leaves the allocator in the same state.
        """
        tape = written.flatten()
        numbers: dict[int, int] = {}
        runs: list[tuple[int, ...]] = []
        freed: list[int] = []
        for event in tape.events:
            if tape.sizes[abs(event)] < BIG_BYTES:
                continue
            if event < 0:
                freed.append(numbers[-event])
                continue
            runs += [tuple(sorted(freed)), (tape.sizes[event],)]
            freed = []
            numbers[event] = len(numbers)
        return [*runs, tuple(sorted(freed))]

    def events_by_run(self, written: WrittenTape) -> list[tuple[int, ...]]:
        """As `lifetimes`, with the bytes of what is freed in place of its number."""
        runs: list[tuple[int, ...]] = []
        freed: list[int] = []
        for num_bytes in self.events(written):
            if num_bytes < 0:
                freed.append(num_bytes)
                continue
            runs += [tuple(sorted(freed)), (num_bytes,)]
            freed = []
        return [*runs, tuple(sorted(freed))]

    def num_small(self, written: WrittenTape) -> int:
        """How many events are smaller."""
        tape = written.flatten()
        return sum(tape.sizes[abs(event)] < BIG_BYTES for event in tape.events)

    def peaks(self) -> tuple[int, int]:
        """Peak allocated bytes of (shape, trace)."""
        return self.memory(self.shape)[0], self.memory(self.trace)[0]

    def memory(self, written: WrittenTape) -> tuple[int, int, int]:
        """Peak allocated and reserved bytes, and the smallest capacity that completes."""
        tape = written.flatten()
        result, need_bytes = replay_with_need(tape.events, tape.sizes, tape.streams, self.job.allocator)
        return result.peak_allocated_bytes, result.peak_reserved_bytes, need_bytes

    def first_difference(self) -> str:
        """Where the two part, in words; empty if they do not."""
        ours, theirs = self._named(self.shape), self._named(self.trace)
        for index, (left, right) in enumerate(zip(ours, theirs)):
            if left[0] != right[0]:
                return f"event {index}: shape {left}, trace {right}, after {ours[max(0, index - 2) : index]}"
        return "" if len(ours) == len(theirs) else f"{len(ours)} events, trace {len(theirs)}"

    def _named(self, written: WrittenTape) -> list[tuple[int, str]]:
        tape = written.flatten()
        named = []
        for event in tape.events:
            num_bytes = tape.sizes[abs(event)]
            if num_bytes >= BIG_BYTES:
                where = written.describe(abs(event)).where
                named.append((num_bytes if event > 0 else -num_bytes, where))
        return named


def compare(job: Job, config: dict[str, Any], *, device: str = "cuda") -> Comparison:
    """Write both tapes."""
    architecture = architecture_from_config(config, name="tiny", source="test")
    behaviour = installed_behaviour(job)
    return Comparison(
        job,
        write_tape(job, architecture, device=device, behaviour=behaviour),
        trace_job(job, config, device=device),
    )
