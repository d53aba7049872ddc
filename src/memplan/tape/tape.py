"""
`Tape`: the ordered allocations and frees of loading a model and of training steps; the one structure between the
writers (shape, trace, snapshot) and everything that reads them (allocator, budget, export, diff).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

CATEGORIES = (
    "weights", "quant_state", "adapters", "gradients", "optimizer", "activations", "logits_loss", "inputs",
    "workspace", "comm", "unknown",
)  # fmt: skip
"""Categories of GPU storages inside torch's allocator; `unknown` is only in tapes that were recorded."""

PHASES = ("load", "forward", "backward", "optimizer_step", "evaluation")


class Storage(NamedTuple):
    """What one allocation holds: `where` names module and tensor, shape and dtype are None when unknown."""

    num_bytes: int
    category: str
    where: str
    dtype: str | None
    shape: tuple[int, ...] | None


class Mark(NamedTuple):
    """A phase begins at `event`: index into `Tape.events` of its first event."""

    event: int
    phase: str
    step: int
    """0 while loading, then 1, 2, ..."""


@dataclass
class Tape:
    """
    Events as ints: `+i` allocates storage `i`, `-i` frees it (ids start at 1 and are never used twice).

    `sizes[i]` is the bytes requested for storage `i`; `sizes[0]` is unused. `streams` holds the ids that live on
    another stream than 0: the allocator keeps pools per stream. Host allocations are not on the tape but in `host`.

    A storage in `recorded` is used by another stream than its own (`record_stream`): its block, once freed, is given
    out again only when the device has come by, which the host knows for sure where it waits. `waits` holds the ids of
    storages of no bytes that stand for such places: what they name is the stream whose last freed storage, and what was
    freed since, need not be over yet; 0 for a wait for all that was queued.
    """

    events: list[int]
    sizes: list[int]
    marks: list[Mark]
    streams: dict[int, int] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)
    waits: dict[int, int] = field(default_factory=dict)


class WrittenTape(Protocol):
    """What every writer returns: a tape, and what each of its storages holds."""

    def flatten(self) -> Tape:
        """The tape, every event of it."""

    def categories(self) -> list[str]:
        """Category by storage id; that of id 0 means nothing."""

    def describe(self, storage_id: int) -> Storage:
        """What a storage holds."""


@dataclass(frozen=True)
class FlatTape:
    """A tape whose storages are listed one by one: `storages[0]` describes id 1."""

    tape: Tape
    storages: list[Storage]

    def flatten(self) -> Tape:
        return self.tape

    def categories(self) -> list[str]:
        return ["", *(storage.category for storage in self.storages)]

    def describe(self, storage_id: int) -> Storage:
        return self.storages[storage_id - 1]
