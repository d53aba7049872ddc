"""The blocks of a model one after the other, and their recomputation in backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from memplan.tape.behaviour import Behaviour
from memplan.tape.engine import backward_from
from memplan.tape.graph import Graph
from memplan.tape.hooks import Units
from memplan.tape.modules import entered, left
from memplan.tape.ops import cast
from memplan.tape.parts import Block, Model
from memplan.tape.recomputation import CheckpointFrame
from memplan.tape.sharded.fsdp1 import Fsdp1Units
from memplan.tape.tensors import Gradients, Node, Parameter, Tensor

CPU_RNG_STATE_BYTES = 5056
"""torch.get_rng_state(), which checkpointing keeps per block; on the host, so that it counts only on the CPU."""


Attend = Callable[[Tensor], tuple[Tensor, list[Tensor]]]
"""Attention of a block, and the weights of eager attention."""


class Given(NamedTuple):
    """
    What the model makes once and gives to its blocks beside the hidden states: the mask, the rotary table, the
    positions. A recomputation keeps all of it.
    """

    mask: Tensor | None
    table: tuple[Tensor, ...] = ()
    """Cosines and sines."""
    position_ids: Tensor | None = None


RunBlock = Callable[[Graph, Model, Block, Tensor, Given, "Settings"], Tensor]
"""A block of a family: (B, S, d) to (B, S, d)."""


class Settings:
    """What the programs need to know of the job."""

    def __init__(
        self, attention: str, behaviour: Behaviour | None = None, *, offload_inputs: bool = False
    ) -> None:
        self.attention = attention
        self.behaviour = behaviour or Behaviour()
        self.offload_inputs = offload_inputs
        self.kept: list[tuple[Parameter, Tensor | None]] | None = None
        """Inputs of checkpointed blocks and their gradients, where something keeps them until backward ends."""
        self.position_ids: Tensor | None = None
        """(B, S) with packing: the batch's own, from which the models see where documents begin."""
        self.input_leaf: Parameter | None = None
        """The embedding's output where it collects a gradient: the graph of the loss keeps both."""
        self.cache: list[tuple[int, Tensor]] = []
        self.rotary_cache: tuple[int, Tensor, Tensor] | None = None
        """Qwen 1's cosines and sines, which the model keeps from step to step, behind the number of their positions."""
        self.npt_metrics: dict[int, list[Tensor]] = {}
        """By block, the scalars that an NPT block keeps of its last forward pass."""
        self.npt_block: Callable[[Block, Tensor, Attend], Tensor] | None = None
        """Runs a converted block, given its attention."""

    def remember(self, g: Graph, layer: int, states: Tensor) -> None:
        """Into the model's cache. Whatever a recomputation returns beside what backward asks for is dropped."""
        if not g.in_backward:
            self.cache.append((layer, states))


def kind_of(model: Model, block: Block) -> str:
    """`sliding_attention` or `full_attention`: what the block takes its mask and its rotary table for."""
    architecture = model.architecture
    if architecture.layer_types:
        return architecture.layer_types[block.layer]
    return architecture.attention_kinds[0]


def run_blocks(
    g: Graph,
    model: Model,
    hidden: Tensor,
    settings: Settings,
    run: RunBlock,
    given: Mapping[str, Given],
) -> Tensor:
    """
    The blocks one after the other, each with what blocks of its kind are given. A checkpointed one keeps its input and
    that.
    """
    base = g.path
    for block in model.blocks:
        g.enter(block.layer)
        g.path = f"{base}.{{layer}}"
        fed = hidden if _feeds_inside(g, settings) else _fed(g, block, hidden)
        step = _bound(g, model, settings, run, given[kind_of(model, block)])
        if block.checkpointed and g.grad_enabled:
            hidden = _checkpointed(g, block, fed, step, settings)
        else:
            hidden = step(block, fed)
        del step, fed
        if g.units is not None:
            g.units.after_forward(block.layer)
    g.path = base
    g.enter(None)
    return hidden


def _bound(
    g: Graph, model: Model, settings: Settings, run: RunBlock, given: Given
) -> Callable[[Block, Tensor], Tensor]:
    def call(block: Block, hidden: Tensor) -> Tensor:
        if _feeds_inside(g, settings):
            hidden = _fed(g, block, hidden)
        entered(g, "layer")
        return left(g, "layer", run(g, model, block, hidden, given, settings))

    return call


def _feeds_inside(g: Graph, settings: Settings) -> bool:
    """Whether the hooks before a block are run inside its checkpoint, and once more by a recomputation."""
    return g.units is not None and g.units.casts_inputs and not settings.behaviour.checkpoints_forward


def _fed(g: Graph, block: Block, hidden: Tensor) -> Tensor:
    """What a block runs on when its parameters are there."""
    if g.units is None:
        return hidden
    if g.units.casts_inputs:
        hidden = _as_fed(g, g.units, hidden)
    if not g.in_backward:
        g.units.before_forward(block.layer, hidden)
    return hidden


def _as_fed(g: Graph, units: Units, hidden: Tensor) -> Tensor:
    """
    FSDP2 casts what a unit is given to the dtype it computes with (MixedPrecisionPolicy.cast_forward_inputs). That is
    outside the unit: backward has left it when the gradient is cast back.
    """
    low = cast(g, hidden, g.autocast or hidden.dtype)
    if low is hidden or low.node is None:
        return low
    cast_back = low.node.backward

    def leave_first(
        g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
    ) -> Gradients:
        units.leave_backward(node.layer)
        return cast_back(g, node, gradients, saved)

    low.node.backward = leave_first
    return low


def _checkpointed(
    g: Graph, block: Block, hidden: Tensor, run: Callable[[Block, Tensor], Tensor], settings: Settings
) -> Tensor:
    path = g.path
    if settings.behaviour.reentrant:
        return _checkpointed_reentrant(g, block, hidden, run, settings)
    host_copy = None
    if settings.offload_inputs:
        # The input goes to the host and comes back for the recomputation. On the CPU the host is the device.
        if g.device == "cpu":
            host_copy = g.new(hidden.shape, hidden.dtype, "input kept on the host").storage
        shape, dtype, node, slot, needs_grad = (
            hidden.shape, hidden.dtype, hidden.node, hidden.slot, hidden.needs_grad,
        )  # fmt: skip

        def rerun() -> None:
            g.path = path
            fetched = g.new(shape, dtype, "input fetched from the host")
            fetched.node, fetched.slot, fetched.needs_grad = node, slot, needs_grad
            run(block, fetched)
    else:

        def rerun() -> None:
            g.path = path
            run(block, hidden)

    frame = CheckpointFrame(g, rerun)
    frame.host_copy = host_copy
    if g.device == "cpu":
        frame.rng_state = g.storage(CPU_RNG_STATE_BYTES, "random state")
    outer, g.save_hook = g.save_hook, frame.pack
    try:
        return run(block, hidden)
    finally:
        g.save_hook = outer


def _checkpointed_reentrant(
    g: Graph,
    block: Block,
    hidden: Tensor,
    run: Callable[[Block, Tensor], Tensor],
    settings: Settings,
) -> Tensor:
    """
    torch.utils.checkpoint with use_reentrant=True (CheckpointFunction): forward without a graph; backward runs the
    whole block again and then its graph, and holds the block's output and its gradient until both are done, and
    the block's input and that one's gradient for as long as `settings.kept`.
    """
    path = g.path
    with g.no_grad():
        out = run(block, hidden)
    if g.needs(hidden):
        backward = partial(_reentrant_backward, path=path, block=block, run=run, settings=settings)
        g.record(out, (hidden,), [hidden], backward)
    return out


def _reentrant_backward(
    g: Graph,
    node: Node,
    gradients: dict[int, Tensor],
    saved: list[Tensor | None],
    *,
    path: str,
    block: Block,
    run: Callable[[Block, Tensor], Tensor],
    settings: Settings,
) -> Gradients:
    x = saved[0]
    assert x is not None and x.storage is not None
    leaf = Parameter("", x.shape, x.dtype, x.storage, block.layer, trainable=True)
    outer = g.path, g.category
    g.path, g.category, g.grad_enabled = path, "activations", True
    attributes, g.attributes = g.attributes, []
    output = run(block, leaf)
    g.leave_autocast()
    g.grad_enabled = False
    units = g.units if settings.behaviour.recomputes_units else None
    if isinstance(units, Fsdp1Units):
        units.after_recomputation(block.layer)
    backward_from(g, output, gradients[0])
    if isinstance(units, Fsdp1Units):
        units.leave_backward(block.layer)
    g.path, g.category = outer
    g.attributes = attributes
    if settings.kept is not None:
        settings.kept.append((leaf, leaf.grad))
    gradient, leaf.grad = leaf.grad, None
    return [gradient]
