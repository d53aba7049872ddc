"""What the accuracy page says of the complete jobs under FSDP1: which peft ran them, and where they are too low."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks.compare import Row, Run
from benchmarks.published import Case
from benchmarks.stream_times import HOOKS, LINKS, RUNS, SECONDS, SLOW_LINK, load_stream_times
from benchmarks.tables import table
from memplan.allocator import replay
from memplan.tape.tape import WrittenTape
from memplan.tape.writer import write_tape
from memplan.units import MiB

TELLING = ("fsdpqlora-3090-7b-lora-bs6-2048", "fsdpqlora-3090-7b-lora-ddp-bs4-2048")
"""Runs in which an adapter's output added in place changes how many large segments there are."""
SHORT = ("fsdpqlora-3090-7b-qlora-bs1-512", "fsdpqlora-3090-7b-lora-bs1-512")
"""Runs whose host was not ahead of the device."""
REPRODUCED = 800e-6
"""Seconds of the host for FSDP's hooks around a unit with which the published times of a step come out."""


def fsdp1_note(rows: Sequence[Row]) -> str:
    """The complete jobs under FSDP1."""
    reserved = {row.case.id: row for row in rows if row.measured.statistic == "reserved"}
    if not all(name in reserved for name in (*TELLING, *SHORT)):
        return ""
    telling = [ahead(reserved[name]) for name in TELLING]
    added = [without_sum_in_place(row) for row in telling]
    return (
        "The jobs of fsdp_qlora run under FSDP1 (torch 2.2). Its source names no version of peft, which until 0.8.2 "
        "adds an adapter's output in place. Planned so, "
        f"{' and '.join(f'`{name}`' for name in TELLING)} are off by "
        f"{' and '.join(f'{row.error:+.2%}' for row in telling)} with a host that is ahead of the device; with a "
        "sum of its own, as since 0.9, by "
        f"{' and '.join(f'{row.error:+.2%}' for row in added)}, in either one segment of the MLP's inner width less: "
        "all of them are planned with 0.8.2.\n\n"
        f"{_pace_note([row for row in rows if row.case.id.startswith(RUNS) and row.measured.statistic == 'reserved'])}"
    )


def _pace_note(rows: Sequence[Row]) -> str:
    """What the host's pace decides."""
    times = load_stream_times()
    lines = [
        [f"`{row.case.id}`", *(_mib(num_bytes, row) for num_bytes in times[row.case.id]["reserved"])]
        for row in rows
    ]
    slow = HOOKS.index(REPRODUCED)
    off = max(abs(times[name]["seconds"][slow] / seconds - 1) for name, seconds in SECONDS.items())
    return (
        "One segment of 20 MiB in the pool of the stream that gathers goes by the host's pace. In backward the matrix "
        "that is let go, the next one and the flat gradient are there at once, and no more than two of 1.3 MiB fit "
        "beside the gathered units. If the host was ahead of the device at any block of the first forward pass, the "
        "unit before was not free yet at a gather, so that a second one was taken, which has room for the third. If "
        "the device waited for the host all the way, the third takes a segment. With 512 tokens it can, with 2048 "
        "kernels are too long. Both are replayed, and the higher is planned, as by `estimate`: "
        f"{_named(reserved_of(rows, SHORT))} are right so, the others with the host ahead. With the host ahead alone "
        f"the two would be off by {_beside_all(map(ahead, reserved_of(rows, SHORT)))}.\n\n"
        "`python -m benchmarks.stream_times` replays them with clocks: operations at the card's peaks, and a range of "
        f"links, {min(LINKS) / 1e9:g} to {max(LINKS) / 1e9:g} GB/s, and of the host's time for FSDP's hooks around a "
        f'unit. With {REPRODUCED * 1e3:g} ms and {SLOW_LINK / 1e9:g} GB/s (PCIe 3.0 with 4 lanes; the source has "slow '
        f'PCI lanes") the times of a step that the source publishes of four of these runs come out within {off:.1%}. '
        "They are means over 512 steps; the segment is taken in the first one, or not. MiB beside the measurement at "
        "that link, by the time for hooks in ms, and the lowest and highest over all links:\n\n"
        + table(
            ["run", *(f"{hooks * 1e3:g}" for hooks in HOOKS), "lowest", "highest"],
            [
                [*line, _mib(times[row.case.id]["lowest"], row), _mib(times[row.case.id]["highest"], row)]
                for line, row in zip(lines, rows)
            ],
            len(HOOKS) + 2,
        )
        + "\n"
    )


def reserved_of(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows of these cases."""
    return [row for row in rows if row.case.id in names]


def _mib(num_bytes: int, row: Row) -> str:
    return f"{(num_bytes - row.measured.bytes) / MiB:+.1f}"


def ahead(row: Row) -> Row:
    """Planned with the host ahead of the device alone."""
    return replace(row, predicted_bytes=Run(row.case, row.case.behaviour).replay.peak_reserved_bytes)


def _beside_all(rows: Iterable[Row]) -> str:
    return " and ".join(map(_beside, rows))


def without_sum_in_place(row: Row) -> Row:
    """The same run with peft since 0.9, the host ahead of the device."""
    later = Run(row.case, replace(row.case.behaviour, adds_in_place=False))
    return replace(row, predicted_bytes=later.replay.peak_reserved_bytes)


def reserved_with_ranks_ahead(case: Case) -> int:
    """
    Reserved peak in bytes, the mean over ranks, of a 4-bit model that the first rank alone has loaded.

    transformers 4.45 leaves packed weights on meta in the others, where FSDP1 then makes each unit empty on the device
    (transformers/modeling_utils.py, _load_state_dict_into_meta_model; accelerate's `param_init_fn`). Nothing is copied
    from their host, so nothing waits for the device, and NCCL may still read the buckets of every unit before.
    """
    reserved = 0
    for rank in range(case.gpus):
        written = write_tape(case.job, case.architecture, behaviour=replace(case.behaviour, rank=rank))
        tape = written.flatten()
        events = _with_buckets_kept(written, tape.events) if rank else tape.events
        replayed = replay(
            events, tape.sizes, tape.streams, case.job.allocator, recorded=tape.recorded, waits=tape.waits
        )
        reserved += replayed.peak_reserved_bytes
    return reserved // case.gpus


def _with_buckets_kept(written: WrittenTape, events: Sequence[int]) -> list[int]:
    """Buckets of the broadcast that wrapping begins with go when the last of them does."""
    buckets = [
        event
        for event in events
        if event < 0 and written.describe(-event).where.endswith("bucket of a broadcast")
    ]
    last, early = buckets[-1], set(buckets[:-1])
    kept = [event for event in events if event not in early]
    at = kept.index(last)
    return [*kept[:at], *buckets[:-1], *kept[at:]]


def _named(rows: Iterable[Row]) -> str:
    return " and ".join(f"`{row.case.id}` ({_beside(row)})" for row in rows)


def _beside(row: Row) -> str:
    return f"{(row.predicted_bytes - row.measured.bytes) / MiB:+.0f} MiB"
