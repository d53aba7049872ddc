"""Activation checkpointing: what a block saves to be run again in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memplan.tape.graph import Graph
from memplan.tape.ops import alias
from memplan.tape.tensors import Parameter, Saved, Storage, Tensor


class StopRecomputation(Exception):
    """Everything that the checkpointed backward needs has been recomputed."""


class CheckpointFrame:
    """
    What a checkpointed block saves instead of its activations: a way to run it again.

    As torch.utils.checkpoint with use_reentrant=False: the first saved tensor that backward asks for runs the block
    again, up to the last tensor it saved; each recomputed tensor lives until the node that saved it has run.
    """

    __slots__ = ("graph", "host_copy", "num_saved", "recomputed", "rerun", "rng_state")

    def __init__(self, graph: Graph, rerun: Callable[[], Any]) -> None:
        self.graph = graph
        self.rerun = rerun
        self.rng_state: Storage | None = None
        self.host_copy: Storage | None = None
        self.num_saved = 0
        self.recomputed: list[Tensor | None] | None = None

    def pack(self, tensors: list[Tensor | None]) -> Saved:
        slots = []
        for tensor in tensors:
            if tensor is None:
                slots.append(-1)
            else:
                slots.append(self.num_saved)
                self.num_saved += 1
        if slots.count(-1) == len(slots):
            return Saved(tensors)
        return CheckpointSaved(self, slots)

    def collect(self, tensors: list[Tensor | None]) -> Saved:
        recomputed = self.recomputed
        assert recomputed is not None
        for tensor in tensors:
            if tensor is not None:
                if isinstance(tensor, Parameter) and tensor.needs_grad:
                    tensor = alias(tensor)  # detached: it keeps what is gathered now
                recomputed.append(tensor)
                if len(recomputed) == self.num_saved:
                    raise StopRecomputation
        return Saved(tensors)

    def recompute(self) -> None:
        graph = self.graph
        self.recomputed = []
        outer = graph.save_hook, graph.grad_enabled, graph.path, graph.category
        attributes, graph.attributes = graph.attributes, []
        graph.save_hook, graph.grad_enabled, graph.category = self.collect, True, "activations"
        try:
            self.rerun()
        except StopRecomputation:
            # Autocast ends while the exception still holds the frames it came through, and their locals.
            graph.autocast_cache.clear()
        finally:
            graph.save_hook, graph.grad_enabled, graph.path, graph.category = outer
            graph.attributes = attributes
            graph.autocast_cache.clear()  # a recomputation enters and leaves autocast by itself


class CheckpointSaved(Saved):
    """Slots of a frame, resolved by recomputation."""

    __slots__ = ("frame", "slots")

    def __init__(self, frame: CheckpointFrame, slots: list[int]) -> None:
        self.frame = frame
        self.slots = slots

    def unpack(self) -> list[Tensor | None]:
        frame = self.frame
        if frame.recomputed is None:
            frame.recompute()
        recomputed = frame.recomputed
        assert recomputed is not None
        tensors = []
        for slot in self.slots:
            tensors.append(None if slot < 0 else recomputed[slot])
            if slot >= 0:
                recomputed[slot] = None
        return tensors
