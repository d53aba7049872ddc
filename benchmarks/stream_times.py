"""
`python -m benchmarks.stream_times`: what the runs of fsdp_qlora reserve where every operation takes its time.

A tape of FSDP1 is replayed with clocks: the host's, and those of the streams that compute, gather and reduce, and of
NCCL's. A block that another stream has used is there again at the first request for memory, by the host's clock, after
its streams have come by (`process_events`). The host waits where FSDP1 does, for the oldest unit let go once there are
two (_limiter_utils.py, _FreeEventQueue). Operations take what the card's stated peaks allow; how long the host takes
and how fast the link is are not published, and are varied. Writes `benchmarks/data/stream_times.json`.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.published import Case, load_published
from memplan.allocator import CachingAllocator
from memplan.model.architecture import Architecture
from memplan.tape.sharded.sharding import GATHER_STREAM, REDUCE_STREAM
from memplan.tape.tape import Tape
from memplan.tape.writer import write_tape
from memplan.units import MiB

FILE = Path(__file__).parent / "data" / "stream_times.json"
RUNS = "fsdpqlora-3090-"
FLOPS = 71e12
"""Dense bfloat16 with sums in float32, of an RTX 3090 (NVIDIA's whitepaper of GA102)."""
BYTES_PER_SECOND = 936e9
LATENCY = 20e-6
"""Of one collective."""
STEPS = 2


class Pace(NamedTuple):
    """Seconds of the host, bytes per second of the link in one direction."""

    hooks: float
    """For FSDP's hooks around one unit, in Python, with the collective."""
    link: float
    launch: float = 20e-6
    """For any other operation."""


HOOKS = (100e-6, 200e-6, 400e-6, 800e-6, 900e-6, 1e-3, 1.2e-3, 1.6e-3, 2.4e-3)
LINKS = (1.5e9, 3.25e9, 6e9, 24e9)
"""PCIe 3.0 with 2 lanes to 4.0 with 16."""
SLOW_LINK = 3.25e9
"""PCIe 3.0 with 4 lanes, of 3.9 GB/s; with it the published times come out."""
SECONDS = {
    "fsdpqlora-3090-7b-qlora-bs1-512": 1082 / 512,
    "fsdpqlora-3090-7b-lora-bs1-512": 2597 / 512,
    "fsdpqlora-3090-7b-qlora-bs1-2048": 1564 / 512,
    "fsdpqlora-3090-7b-lora-bs1-2048": 3090 / 512,
}
"""Published, of one step: 1024 samples on two cards."""


class Timed(NamedTuple):
    """A run with clocks."""

    reserved_bytes: int
    step_seconds: float
    """Forward and backward of the last step."""


COMPUTE, GATHER, GATHER_AHEAD, FLAT, REDUCE, LIMITER, WAIT_FOR_ALL = range(7)


class Operation(NamedTuple):
    """What an allocation stands for; `seconds` of those that compute."""

    kind: int
    seconds: float = 0.0
    num_bytes: int = 0


@dataclass(frozen=True)
class Steps:
    """A tape with the operation of every allocation from the first step on."""

    tape: Tape
    start: int
    """The first event of the first step."""
    operations: dict[int, Operation]
    with_gradient: frozenset[int]
    """Gathered storages that the hook of AccumulateGrad lets go, on the stream that gathers."""


def steps_of(case: Case) -> Steps:
    """The tape of a run, read."""
    written = write_tape(case.job, case.architecture, behaviour=case.behaviour, num_steps=STEPS)
    tape = written.flatten()
    start = tape.marks[1].event
    events = tape.events[start:]
    made = [event for event in events if event > 0]
    names = [written.describe(event).where for event in made]
    tokens = case.job.micro_batch_size * case.job.max_seq_len
    operations: dict[int, Operation] = {}
    following = ""
    for event, name in zip(reversed(made), reversed(names)):
        size, stream = tape.sizes[event], tape.streams.get(event, 0)
        if event in tape.waits:
            operations[event] = Operation(LIMITER if tape.waits[event] else WAIT_FOR_ALL)
            continue
        if name.endswith("all-gather output"):
            # Backward fetches the unit that comes next just before the gradient of this one's weight.
            kind = GATHER_AHEAD if following.endswith("weight grad") else GATHER
            operations[event] = Operation(kind, num_bytes=size)
        elif stream == GATHER_STREAM:
            operations[event] = Operation(FLAT, 2 * size / BYTES_PER_SECOND)
        elif stream == REDUCE_STREAM:
            operations[event] = Operation(REDUCE, num_bytes=size)
        else:
            flops = _flops(name, case.architecture, tokens, case.job.max_seq_len, case.job.lora.rank)
            operations[event] = Operation(COMPUTE, max(flops / FLOPS, 3 * size / BYTES_PER_SECOND))
        following = name
    with_gradient = frozenset(
        -event
        for before, event in pairwise(events)
        if event < 0 < before and operations[before].kind == FLAT and _is_gathered(operations, -event)
    )
    return Steps(tape, start, operations, with_gradient)


def _is_gathered(operations: dict[int, Operation], storage: int) -> bool:
    return storage in operations and operations[storage].kind in (GATHER, GATHER_AHEAD)


def _flops(name: str, architecture: Architecture, tokens: int, length: int, rank: int) -> float:
    """Of a product; 0 for what the memory's bandwidth bounds."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    if name.endswith("attention output"):
        return 2 * tokens * length * hidden
    if name.endswith("logits"):
        return 2 * tokens * hidden * architecture.vocab_size
    if "_proj" not in name or not name.endswith((" output", "grad of input", "weight grad")):
        return 0
    if ".lora_" not in name:
        return 2 * tokens * hidden * (inner if ".mlp." in name else hidden)
    is_wide = "down_proj.lora_A" in name or "gate_proj.lora_B" in name or "up_proj.lora_B" in name
    return 2 * tokens * rank * (inner if is_wide else hidden)


@dataclass
class Clocks:
    """When each of them is done with what it was given, in seconds."""

    host: float = 0.0
    compute: float = 0.0
    gather: float = 0.0
    nccl: float = 0.0
    ahead: float = 0.0
    """When the last gather is over that the stream that computes has not yet been told to wait for."""
    let_go: deque[float] = field(default_factory=deque)
    """When units let go are done with, by the events that the host waits for."""

    def all(self) -> float:
        """When everything that was queued is done."""
        return max(self.host, self.compute, self.gather, self.nccl)


def timed(case: Case, steps: Steps, pace: Pace) -> Timed:
    """A run at one pace; `steps` is of `case`."""
    tape, operations = steps.tape, steps.operations
    allocator = CachingAllocator(case.job.allocator)
    sizes = allocator.all_block_bytes(tape.sizes)
    allocator.run(tape.events[: steps.start], sizes, tape.streams)
    clocks = Clocks()
    ready: dict[int, float] = {}
    """When outstanding blocks are done with."""
    times = {mark.event: 0.0 for mark in tape.marks if mark.step == STEPS}
    for index, event in enumerate(tape.events[steps.start :], steps.start):
        if index in times:
            times[index] = clocks.all()
        if event > 0:
            _ask(operations[event], clocks, pace)
            _pass_events(allocator, ready, clocks.host)
            allocator.run((event,), sizes, tape.streams)
            _launch(operations[event], clocks, pace)
        elif -event in tape.recorded:
            ready[-event] = _let_go(steps, -event, clocks, pace)
            allocator.free_recorded(-event)
        else:
            allocator.run((event,), sizes, tape.streams)
    forward, _, optimizer, *_ = times.values()
    return Timed(allocator.peak_reserved_bytes, optimizer - forward)


def _pass_events(allocator: CachingAllocator, ready: dict[int, float], now: float) -> None:
    over = [storage for storage in allocator.outstanding if ready[storage] <= now]
    if over:
        rows = allocator.outstanding
        rest = {storage: row for storage, row in rows.items() if ready[storage] > now}
        allocator.outstanding = {storage: rows[storage] for storage in over} | rest
        allocator.pass_events(len(over))


def _ask(operation: Operation, clocks: Clocks, pace: Pace) -> None:
    """What the host does before it asks for the memory."""
    if operation.kind == WAIT_FOR_ALL:
        clocks.host = clocks.all()
    elif operation.kind == LIMITER:
        clocks.host += pace.hooks / 3
        clocks.compute = max(clocks.compute, clocks.ahead)
        if len(clocks.let_go) >= 2:
            clocks.host = max(clocks.host, clocks.let_go.popleft())


def _launch(operation: Operation, clocks: Clocks, pace: Pace) -> None:
    """The operation, on its stream: a collective gets and gives half of what is gathered or reduced on two ranks."""
    kind, seconds, num_bytes = operation
    if kind == COMPUTE:
        clocks.host += pace.launch
        clocks.compute = max(clocks.compute, clocks.host) + seconds
    elif kind in (GATHER, GATHER_AHEAD):
        clocks.host += pace.hooks / 3
        clocks.nccl = max(clocks.nccl, clocks.gather, clocks.host) + LATENCY + num_bytes / 2 / pace.link
        clocks.gather = clocks.ahead = clocks.nccl
        if kind == GATHER:
            clocks.compute = max(clocks.compute, clocks.gather)
    elif kind == FLAT:
        clocks.host += pace.launch
        clocks.gather = max(clocks.gather, clocks.compute, clocks.host) + seconds
    elif kind == REDUCE:
        clocks.host += pace.launch
        clocks.nccl = max(clocks.nccl, clocks.gather, clocks.host) + LATENCY + num_bytes / pace.link


def _let_go(steps: Steps, storage: int, clocks: Clocks, pace: Pace) -> float:
    """When all streams that have used a storage, which goes now, have come by."""
    if not _is_gathered(steps.operations, storage):
        return clocks.nccl if steps.operations[storage].kind == FLAT else clocks.gather
    done = clocks.gather if storage in steps.with_gradient else clocks.compute
    clocks.let_go.append(done)
    clocks.host += pace.hooks / 3
    return max(clocks.nccl, done)


def load_stream_times() -> dict[str, Any]:
    """What `main` has written."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def main() -> int:
    """
    Of every run the lowest and the highest bytes reserved over all paces, and at every pace of the hooks over the slow
    link the bytes reserved and, of the runs whose time is published, the seconds of a step.
    """
    result: dict[str, Any] = {}
    for case in load_published():
        if not case.id.startswith(RUNS) or not case.fields:
            continue
        steps = steps_of(case)
        runs = {(hooks, link): timed(case, steps, Pace(hooks, link)) for hooks in HOOKS for link in LINKS}
        reserved = [run.reserved_bytes for run in runs.values()]
        slow = [runs[hooks, SLOW_LINK] for hooks in HOOKS]
        result[case.id] = {
            "lowest": min(reserved),
            "highest": max(reserved),
            "reserved": [run.reserved_bytes for run in slow],
            "seconds": [round(run.step_seconds, 3) for run in slow],
        }
        beside = [
            round((num_bytes - case.measured.bytes) / MiB, 1) for num_bytes in result[case.id]["reserved"]
        ]
        print(case.id, beside, result[case.id]["seconds"], SECONDS.get(case.id), flush=True)
    FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
