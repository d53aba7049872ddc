"""
Linear layers as GPTQ stores them: eight weights of 4 bits to an int32, and a scale and a zero for each group of inputs.

What computes with them differs (`GptqSoftware.kernel`). With "triton" one kernel writes the weight in float16 inside a
function of Python's, in forward and again in backward (fms-acceleration's triton_utils/dequant.py). With "compiled",
gptqmodel's TorchLinear, torch.compile makes one kernel of its dequantize_weight; the product is torch's own, which
keeps the weight until backward. With "unpacked", auto-gptq's qlinear_cuda_old.py, that is written in torch operations,
and the weight is kept too.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from memplan.tape.graph import Graph
from memplan.tape.linear_layer import Linear
from memplan.tape.ops import alias
from memplan.tape.quantized import FUNCTIONS_OWN_GRADIENTS
from memplan.tape.tensors import Gradients, Node, Tensor

BITS = 4
_PER_WORD = 32 // BITS


class Held(NamedTuple):
    """A tensor of a layer."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_packed: bool = False
    """Weights or zeros: what fms-acceleration makes parameters of, for FSDP to shard."""


def tensors_of(
    in_features: int, out_features: int, *, group_size: int | None, kernel: str, bias: bool
) -> list[Held]:
    """
    The buffers of a layer in the order in which they are registered.

    Args:
        group_size: inputs that share a scale; None for all.
        bias: of float16; auto-gptq's layers have one that optimum made, zero where the model has none.
    """
    groups = ceil(in_features / (group_size or in_features))
    held = [
        Held("qweight", (ceil(in_features / _PER_WORD), out_features), "int32", is_packed=True),
        Held("qzeros", (groups, ceil(out_features / _PER_WORD)), "int32", is_packed=True),
        Held("scales", (groups, out_features), "float16"),
        Held("g_idx", (in_features,), "int32"),
    ]
    if bias:
        held.append(Held("bias", (out_features,), "float16"))
    tables = {"compiled": ("wf_unsqueeze_zero", "wf_unsqueeze_neg_one"), "unpacked": ("wf",)}
    return held + [Held(name, (_PER_WORD,), "int32") for name in tables.get(kernel, ())]


def dequantised(g: Graph, layer: Linear) -> Tensor:
    """The weight (in, out) by one kernel."""
    return g.new((layer.in_features, layer.out_features), "float16", "dequantised weight", "workspace")


def unpacked(g: Graph, layer: Linear) -> tuple[Tensor, Tensor]:
    """
    The weight (in, out) by torch operations, and the zeros, which live until the layer returns. Shifted words are
    int32, what is kept of them int8; auto-gptq 0.4 masks that in place.
    """
    assert layer.gptq is not None
    groups = ceil(layer.in_features / (layer.gptq.group_size or layer.in_features))
    zeros = _bytes_of_words(g, (groups, layer.out_features), "zeros")
    zeros = g.new(zeros.shape, "int8", "zeros + 1", "workspace")
    shape = (layer.in_features, layer.out_features)
    values = _bytes_of_words(g, shape, "weight")
    if not layer.gptq.masks_in_place:
        values = g.new(shape, "int8", "masked weight", "workspace")
    difference = g.new(shape, "int8", "weight less zeros", "workspace")
    weight = g.new(shape, "float16", "dequantised weight")
    del difference, values
    return weight, zeros


def _bytes_of_words(g: Graph, shape: tuple[int, ...], name: str) -> Tensor:
    words = g.new(shape, "int32", f"{name}, shifted", "workspace")
    out = g.new(shape, "int8", f"{name} in bytes", "workspace")
    del words
    return out


def recomputed(g: Graph, x: Tensor, layer: Linear) -> Tensor:
    """QuantLinearFunction: x (..., in) to (..., out), of which nothing is saved but what the layer holds."""
    weight = dequantised(g, layer)
    dtype = g.autocast or "float16"
    low_x = x if x.dtype == dtype else g.new(x.shape, dtype, f"cast to {dtype}", "workspace")
    g.claim_workspace()
    out = g.new((*x.shape[:-1], layer.out_features), dtype, "output")
    del low_x, weight
    if g.needs(x):
        g.record(out, (x,), [], _recomputed_backward, (x.shape, x.dtype, layer))
    return out


def _recomputed_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    shape, dtype, layer = node.extra
    weight = dequantised(g, layer)
    g.claim_workspace()
    out = g.new(shape, gradients[0].dtype, "grad of input")
    del weight
    if g.target.torch >= FUNCTIONS_OWN_GRADIENTS:
        gradients.clear()
    if (
        out.dtype != dtype
    ):  # the engine gives it the input's (torch/csrc/autograd/engine.cpp, validate_outputs)
        out = g.new(shape, dtype, f"cast to {dtype}")
    return [out]


def add_to_view(g: Graph, a: Tensor, b: Tensor, name: str) -> Tensor:
    """
    `a += b`, where `a` is a view of all of another tensor: from then on it is an as_strided view of that, whose
    backward fills zeros (FunctionsManual.cpp, as_strided_backward), and the sum is the other's, whose gradient is a
    copy, as is for a moment what the view shows of it (autograd/functions/tensor.cpp, CopySlices).
    """
    out = alias(a)
    out.view = a.view
    if g.needs(a, b):
        g.record(out, (a, b), [], _copy_slices_backward)
    return out


def _copy_slices_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    shape, dtype = gradients[0].shape, gradients[0].dtype
    strided = g.new(shape, dtype, "grad of view")
    gradients.clear()
    out = g.new(shape, dtype, "grad of base")
    shown = g.new(shape, dtype, "what the view shows of it")
    del strided
    return [out if node.edges[0] is not None else None, shown if node.edges[1] is not None else None]
