"""
FSDP2 as accelerate sets it up under transformers' Trainer (accelerate 1.15, utils/fsdp_utils.py, fsdp2_prepare_model):
beside the blocks, the input embeddings are a unit, and what comes last another one that stays gathered from forward to
backward: the last norm, which is found in a model without adapters only, the head, and embeddings tied to it. What is
left is the root's.

Micro batches before the last of a step reduce nothing (Accelerator.no_sync): whole gradients wait on every rank.
"""

from __future__ import annotations

from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.model.families import layout as layout_of
from memplan.tape.graph import Graph
from memplan.tape.sharded.fsdp2 import Fsdp2Units
from memplan.tape.sharded.sharding import Contents, Layout
from memplan.tape.tensors import Gradients, Node, Tensor

EMBEDDING, TAIL = -1, -2
"""Units outside the blocks, beside the root."""


def shard_of(
    job: Job, architecture: Architecture, name: str, layer: int | None, stored: str, *, trains: bool
) -> tuple[int | None, str]:
    """A parameter's unit, and the dtype that its shard is stored in (Behaviour.accelerate_fsdp2)."""
    is_upcast = trains and job.autocast is not None and not job.has_quantized_base
    unit = _outside(name, job, architecture) if layer is None else layer
    return unit, "float32" if is_upcast else stored


def _outside(name: str, job: Job, architecture: Architecture) -> int | None:
    """The unit of a parameter outside the blocks; None for the root."""
    modules = layout_of(architecture)
    embedding, head = modules.before[0].name, modules.after[-1].name
    norm = modules.after[-2].name if len(modules.after) > 1 else ""
    if name.startswith(f"{embedding}.") or name.startswith(f"{embedding} "):
        return TAIL if architecture.tie_word_embeddings else EMBEDDING
    if name.startswith(f"{head}."):
        return TAIL
    if name.startswith(f"{norm}.") and job.method == "full" and not architecture.is_encoder:
        return TAIL
    return None


class AccelerateUnits(Fsdp2Units):
    """
    The units in a graph.

    Args:
        reduce_dtype: of mixed precision, in which gradients are reduced; None: each in its own.
        norm_is_last: the last norm is of the unit of the head.
    """

    def __init__(
        self,
        g: Graph,
        layout: Layout,
        contents: Contents,
        *,
        reduce_dtype: str | None,
        is_tied: bool,
        norm_is_last: bool,
    ) -> None:
        super().__init__(g, layout, contents)
        self.reduce_dtype = reduce_dtype
        self.is_tied = is_tied
        self.norm_is_last = norm_is_last

    def after_forward(self, layer: int | None) -> None:
        """A unit without parameters has no hooks."""
        if layer not in (None, TAIL) and not self.layout.keep_unsharded:
            self.unsharded.pop(layer, None)
        if self.contents.parts.get(layer):
            self.order.append(layer)
        if layer is None:
            self.copied_last = None

    def leave_backward(self, layer: int | None) -> None:
        """Backward goes from the head to the blocks by the input of the unit that comes last."""
        super().leave_backward(TAIL if layer is None else layer)

    def units(self) -> tuple[int | None, ...]:
        return (None, EMBEDDING, *self.contents.layers, TAIL)

    def _post_backward(self, layer: int | None) -> None:
        if self.is_last:
            super()._post_backward(layer)
        else:
            self.unsharded.pop(layer, None)


def embedding_begins(g: Graph) -> None:
    """Before the input embeddings are read."""
    if isinstance(g.units, AccelerateUnits):
        g.units.before_forward(TAIL if g.units.is_tied else EMBEDDING, None)


def embedding_ends(g: Graph, out: Tensor) -> None:
    """They have been."""
    if isinstance(g.units, AccelerateUnits) and not g.units.is_tied:
        g.units.after_forward(EMBEDDING)
        _visited_with(g.units, EMBEDDING, out)


def norm_begins(g: Graph, x: Tensor) -> None:
    """Before the last norm."""
    if isinstance(g.units, AccelerateUnits) and g.units.norm_is_last:
        _tail_begins(g.units, x)


def head_begins(g: Graph, x: Tensor) -> None:
    """Before the head."""
    if isinstance(g.units, AccelerateUnits) and not g.units.norm_is_last:
        _tail_begins(g.units, x)


def head_ends(g: Graph, logits: Tensor) -> None:
    """The logits are there."""
    if isinstance(g.units, AccelerateUnits):
        g.units.after_forward(TAIL)
        _visited_with(g.units, TAIL, logits)


def _tail_begins(units: AccelerateUnits, x: Tensor) -> None:
    # With tied embeddings the unit's first input are token ids, which have no gradient.
    units.before_forward(TAIL, None if units.is_tied else x)


def _visited_with(units: AccelerateUnits, unit: int, out: Tensor) -> None:
    """Backward visits a unit when the gradient of its output is there (FSDPState._register_pre_backward_hook)."""
    if out.node is None:
        return
    run = out.node.backward

    def visit_first(
        g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
    ) -> Gradients:
        units.visit_backward(unit)
        return run(g, node, gradients, saved)

    out.node.backward = visit_first
