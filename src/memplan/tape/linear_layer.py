"""What a linear layer is: its weight or where that is packed, its bias, its adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from memplan.tape.graph import Graph
from memplan.tape.tensors import Parameter, Tensor
from memplan.tape.token_rows import TokenRows, merged


class Adapter(NamedTuple):
    """LoRA beside a linear layer: A (r, in), B (out, r)."""

    a: Parameter
    b: Parameter
    dropout: float
    asked_dtype: str
    """What peft is told that A's dtype is, to which it casts the input."""


class Gptq(NamedTuple):
    """How a weight that GPTQ has quantised is computed with (tape/gptq.py)."""

    group_size: int | None
    kernel: str
    """GptqSoftware.kernel (tape/software.py)"""
    masks_in_place: bool = False
    """Of the kernel "unpacked"."""
    bias: Tensor | None = None
    adds_in_place: bool = False
    """GptqSoftware.adds_in_place"""


@dataclass
class Linear:
    """A linear layer as the programs call it. The weight of a quantised one is no parameter."""

    name: str
    in_features: int
    out_features: int
    weight: Parameter | None
    bias: Parameter | None = None
    adapter: Adapter | None = None
    dtype: str = "bfloat16"
    conv: bool = False
    """transformers' Conv1D: addmm itself, its arguments in that order."""
    transposes: bool = False
    """Falcon's `input @ weight.T`: autocast keeps casts of leaves, not of views."""
    quantized: bool = False
    has_8_bits: bool = False
    """Of a quantised layer; else it has 4."""
    gptq: Gptq | None = None
    """Of a layer that GPTQ has quantised; bitsandbytes has any other."""
    double_quant: bool = False
    keeps_input: bool = False
    """The node of a 4-bit product has its input as an attribute (behaviour.py, keeps_4bit_input)."""
    adds_in_place: bool = False
    """An adapter's output is added to this layer's in place (behaviour.py)."""
    held: list[Tensor] = field(default_factory=list)
    """Packed weight and quantisation state of a quantised layer: alive as long as the layer."""
    rows: TokenRows | None = None
    """Of a head: its rows that train."""
    is_copy: bool = False
    """Of a head: it trains whole, in place of the one that was loaded."""

    def current_weight(self, g: Graph) -> Tensor:
        """The weight as code sees it that asks for it."""
        if self.rows is not None:
            return merged(g, self.rows)
        assert self.weight is not None
        return self.weight

    @property
    def is_plain(self) -> bool:
        """Whether a frozen weight alone makes the output: no bias, adapter or rows that train, not quantised."""
        return self.has_only_weight and self.rows is None and not self.is_copy

    @property
    def has_only_weight(self) -> bool:
        """As `is_plain`, but the weight or rows of it may train."""
        return self.bias is None and self.adapter is None and not self.quantized
