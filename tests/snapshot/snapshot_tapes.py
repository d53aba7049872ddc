"""Tapes to write and to read: any, as hypothesis draws them, and a small one with names."""

from __future__ import annotations

from hypothesis import strategies as st

from memplan.job.spec import AllocatorSettings
from memplan.tape.tape import CATEGORIES, PHASES, FlatTape, Mark, Storage, Tape
from memplan.units import MiB

SETTINGS = (
    AllocatorSettings(expandable_segments=False),
    AllocatorSettings(expandable_segments=True),
    AllocatorSettings(expandable_segments=False, max_split_size_mb=25, roundup_power2_divisions=4),
)

settings = st.sampled_from(SETTINGS)
sizes = st.one_of(
    st.integers(1, 4096),
    st.integers(1, 40 * MiB),
    st.sampled_from([512, MiB, MiB + 1, 2 * MiB, 10 * MiB, 20 * MiB]),
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
shapes = st.none() | st.lists(st.integers(0, 9), max_size=4).map(tuple)
dtypes = st.none() | st.sampled_from(["bfloat16", "float32", "int64", "uint8"])
marks = st.tuples(st.sampled_from([*PHASES, "end", "evaluation"]), st.integers(0, 3))


@st.composite
def written_tapes(draw: st.DrawFn) -> FlatTape:
    """A tape of up to 40 storages on three streams, with phases anywhere, empty ones too."""
    tape = Tape([], [0], [])
    storages = []
    live: list[int] = []
    for _ in range(draw(st.integers(0, 40))):
        for phase, step in draw(st.lists(marks, max_size=2)) if draw(st.integers(0, 5)) == 0 else ():
            tape.marks.append(Mark(len(tape.events), phase, step))
        if live and draw(st.booleans()):
            tape.events.append(-live.pop(draw(st.integers(0, len(live) - 1))))
            continue
        storage_id = len(tape.sizes)
        size = draw(sizes)
        tape.sizes.append(size)
        tape.events.append(storage_id)
        live.append(storage_id)
        stream = draw(st.sampled_from([0, 0, 1, 7]))
        if stream:
            tape.streams[storage_id] = stream
        storages.append(
            Storage(size, draw(st.sampled_from(CATEGORIES)), draw(names), draw(dtypes), draw(shapes))
        )
    if draw(st.booleans()):
        tape.marks.append(Mark(len(tape.events), "end", draw(st.integers(0, 3))))
    return FlatTape(tape, storages)


def small_tape(*, logits_mib: int = 96, extra: Storage | None = None) -> FlatTape:
    """
    Loading, forward, backward and the optimizer step of something small; `extra` is one more storage that is kept
    from forward to backward. The peak is in backward: weights, activations, logits and their gradient.
    """
    storages: list[Storage] = []
    tape = Tape([], [0], [])

    def mark(phase: str, step: int) -> None:
        tape.marks.append(Mark(len(tape.events), phase, step))

    def new(mib: int, category: str, where: str) -> int:
        return add(Storage(mib * MiB, category, where, "float32", (mib, MiB // 4)))

    def add(storage: Storage) -> int:
        storages.append(storage)
        tape.sizes.append(storage.num_bytes)
        tape.events.append(len(storages))
        return len(storages)

    def free(*ids: int) -> None:
        tape.events.extend(-storage_id for storage_id in ids)

    mark("load", 0)
    weights = [new(30, "weights", f"layers.{layer}.weight") for layer in range(2)]
    mark("forward", 1)
    kept = [new(12, "activations", f"layers.{layer} output") for layer in range(2)]
    kept += [] if extra is None else [add(extra)]
    logits = new(logits_mib, "logits_loss", "lm_head logits")
    mark("backward", 1)
    gradient = new(logits_mib, "logits_loss", "lm_head grad of logits")
    free(logits, gradient)
    gradients = [new(30, "gradients", f"layers.{layer}.weight grad") for layer in range(2)]
    free(*kept)
    mark("optimizer_step", 1)
    for _ in weights:
        new(60, "optimizer", "state")
    free(*gradients)
    mark("end", 1)
    return FlatTape(tape, storages)
