"""The parts of a model as the programs run it: blocks, what is outside them, linear layers by their paths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from memplan.model.architecture import Architecture
from memplan.model.families import layout as layout_of
from memplan.model.families.layout import Module
from memplan.tape.experts import Stack
from memplan.tape.graph import Graph
from memplan.tape.linear_layer import Linear
from memplan.tape.sharded.ddp import Buckets
from memplan.tape.tensors import Parameter, Tensor
from memplan.tape.token_rows import TokenRows, merged


@dataclass
class NptModulator:
    """Parameters of the deltas of one converted block, named as in memplan.npt.modulator."""

    a: Parameter
    b: Parameter
    c: Parameter | None
    bias: Parameter | None
    up: NptModulator | None = None
    down: NptModulator | None = None


@dataclass
class Block:
    """One transformer block."""

    layer: int
    linears: dict[str, Linear]
    norms: dict[str, Parameter]
    stacks: dict[str, Stack] = field(default_factory=dict)
    """The router and the stacked weights of experts."""
    checkpointed: bool = False
    npt: NptModulator | None = None


@dataclass
class Model:
    """Everything that stays in memory between steps, and the parameters that train, in the optimizer's order."""

    architecture: Architecture
    blocks: list[Block]
    embedding: Parameter
    head: Linear
    outside: dict[str, Parameter]
    """Parameters outside the blocks by their names, those of linear layers excepted."""
    buffers: dict[str, Tensor]
    linears: dict[str, Linear] = field(default_factory=dict)
    """Linear layers outside the blocks, in front of the head."""
    trainable: list[Parameter] = field(default_factory=list)
    buckets: Buckets | None = None
    rows: TokenRows | None = None
    """Rows of the embeddings that train while the others do not."""

    def current_embedding(self, g: Graph) -> Tensor:
        """The embeddings that ids are looked up in."""
        return self.embedding if self.rows is None else merged(g, self.rows)


class LinearSpec(NamedTuple):
    """A linear layer by its path in the block (or, for the head, in the model)."""

    path: str
    in_features: int
    out_features: int
    bias: bool
    transposed: bool = False


def block_linears(architecture: Architecture) -> list[LinearSpec]:
    """The linear layers of one block, in module order."""
    return [linear_spec(module) for module in layout_of(architecture).block if module.role == "linear"]


def linear_spec(module: Module) -> LinearSpec:
    """Of a linear layer of the layout."""
    in_features, out_features = module.shape if module.transposed else reversed(module.shape)
    return LinearSpec(module.name, in_features, out_features, module.bias, module.transposed)
