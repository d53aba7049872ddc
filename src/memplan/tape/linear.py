"""
Linear layers: plain, 4-bit, with a low-rank adapter, and transformers' Conv1D.

A 3-D input is folded to a matrix, so every product is `mm`, or `addmm` where there is a bias
(aten/src/ATen/native/Linear.cpp). Both save what the other side's gradient needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memplan.tape.engine import Gradients, Graph, Node, Parameter, Tensor
from memplan.tape.ops import add, cast, dropout, scale


@dataclass
class Adapter:
    """LoRA beside a linear layer: A (r, in), B (out, r)."""

    a: Parameter
    b: Parameter
    dropout: float


@dataclass
class Linear:
    """A linear layer as the programs call it. `packed_bytes`: 4-bit storage; the weight is then not a parameter."""

    name: str
    in_features: int
    out_features: int
    weight: Parameter | None
    bias: Parameter | None = None
    adapter: Adapter | None = None
    dtype: str = "bfloat16"
    quantized: bool = False
    double_quant: bool = False
    held: list[Tensor] = field(default_factory=list)
    """Packed weight and quantisation state of a 4-bit layer: alive as long as the layer."""


def autocast_to(g: Graph, tensor: Tensor) -> Tensor:
    """
    Autocast's cast of an argument; float32 leaves that train are cast once and kept until autocast ends.

    (aten/src/ATen/autocast_mode.cpp, cached_cast)
    """
    dtype = g.autocast
    if dtype is None or tensor.dtype not in ("float32", "float16", "bfloat16"):
        return tensor
    if isinstance(tensor, Parameter) and tensor.needs_grad and tensor.dtype == "float32":
        if id(tensor) not in g.autocast_cache:
            g.autocast_cache[id(tensor)] = (tensor.layer, cast(g, tensor, dtype))
        return g.autocast_cache[id(tensor)][1]
    return cast(g, tensor, dtype)


def matmul(g: Graph, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """x (..., in) times a weight of any orientation: (..., out)."""
    if bias is not None:
        bias = autocast_to(g, bias)
    weight = autocast_to(g, weight)  # the compiler evaluates autocast's arguments from the last to the first
    x = autocast_to(g, x)
    needed = g.needs(x, weight, bias)
    saved = g.save(x if weight.needs_grad else None, weight if x.needs_grad else None) if needed else None
    g.claim_workspace()
    out = g.new((*x.shape[:-1], out_features), x.dtype, "output")
    if saved is not None:
        inputs = (x, weight) if bias is None else (x, weight, bias)
        g.record(out, inputs, saved, _matmul_backward, (x.shape, weight.shape))
    return out


def _matmul_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """
    mm: the weight's gradient first, then the input's; addmm the other way round, and the bias gets the gradient
    itself, summed over rows. The input's gradient is a view: the product is of the folded matrix.
    """
    gradient = gradients[0]
    x_shape, weight_shape = node.extra
    edge_x, edge_weight = node.edges[:2]
    has_bias = len(node.edges) > 2
    g.claim_workspace()
    grad_x = grad_weight = None
    for wanted in ("input", "weight") if has_bias else ("weight", "input"):
        if wanted == "weight" and edge_weight is not None:
            grad_weight = g.new(weight_shape, gradient.dtype, "grad of weight")
        elif wanted == "input" and edge_x is not None:
            grad_x = g.new(x_shape, gradient.dtype, "grad of input")
            grad_x.view = len(x_shape) > 2
    if not has_bias:
        return [grad_x, grad_weight]
    return [grad_x, grad_weight, gradient if node.edges[2] is not None else None]


def matmul_4bit(g: Graph, x: Tensor, layer: Linear) -> Tensor:
    """
    bitsandbytes' MatMul4Bit: the weight is dequantised to the compute dtype for the product and thrown away, in
    forward and again in backward; nothing of the input is saved (bitsandbytes/autograd/_functions.py). Linear4bit
    gives its output the input's dtype (nn/modules.py).
    """
    dtype = x.dtype
    x = cast(g, x, layer.dtype)
    weight = dequantized(g, layer)
    g.claim_workspace()
    out = g.new((*x.shape[:-1], layer.out_features), x.dtype, "output")
    del weight
    if g.needs(x):
        g.record(out, (x,), [], _matmul_4bit_backward, (x.shape, layer))
    return cast(g, out, dtype)


def _matmul_4bit_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    shape, layer = node.extra
    weight = dequantized(g, layer)
    g.claim_workspace()
    out = g.new(shape, gradients[0].dtype, "grad of input")
    del weight
    return [out]


def dequantized(g: Graph, layer: Linear) -> Tensor:
    """The weight in the compute dtype; on the way, double quantisation's constants in float32."""
    shape = (layer.out_features, layer.in_features)
    if not layer.double_quant:
        return g.new(shape, layer.dtype, "dequantised weight", "workspace")
    constants = g.new((shape[0] * shape[1] // 64,), "float32", "quantisation constants", "workspace")
    weight = g.new(shape, layer.dtype, "dequantised weight", "workspace")
    del constants
    return weight


def linear(g: Graph, x: Tensor, layer: Linear) -> Tensor:
    """The layer as transformers calls it, with its adapter if it has one."""
    with g.module(layer.name):
        if layer.adapter is None:
            return _base(g, x, layer)
        return _with_adapter(g, x, layer, layer.adapter)


def _base(g: Graph, x: Tensor, layer: Linear) -> Tensor:
    if layer.quantized:
        return matmul_4bit(g, x, layer)
    assert layer.weight is not None
    return matmul(g, x, layer.weight, layer.bias, layer.out_features)


def _with_adapter(g: Graph, x: Tensor, layer: Linear, adapter: Adapter) -> Tensor:
    """
    peft's lora.Linear.forward (lora.bnb.Linear4bit for 4-bit layers, which copies the base's output first and casts
    the adapter's output back before the sum).
    """
    result = _base(g, x, layer)
    dtype = result.dtype
    if layer.quantized:
        result = _clone(g, result)
        if g.autocast is None:
            x = cast(g, x, adapter.a.dtype)
        output = _low_rank(g, x, adapter)
        if g.autocast is None:
            output = cast(g, output, dtype)
        result = add(g, result, output, "output")
        return result
    x = cast(g, x, adapter.a.dtype)
    result = add(g, result, _low_rank(g, x, adapter), "sum with adapter")
    result = cast(g, result, dtype)
    return result


def _low_rank(g: Graph, x: Tensor, adapter: Adapter) -> Tensor:
    return scale(
        g, _lora_b(g, _lora_a(g, dropout(g, x, adapter.dropout), adapter), adapter), "scaled adapter output"
    )


def _lora_a(g: Graph, x: Tensor, adapter: Adapter) -> Tensor:
    with g.module("lora_A"):
        return matmul(g, x, adapter.a, None, adapter.a.shape[0])


def _lora_b(g: Graph, x: Tensor, adapter: Adapter) -> Tensor:
    with g.module("lora_B"):
        return matmul(g, x, adapter.b, None, adapter.b.shape[0])


def _clone(g: Graph, x: Tensor) -> Tensor:
    out = g.new(x.shape, x.dtype, "copy")
    if g.needs(x):
        g.record(out, (x,), [], _pass_backward)
    return out


def _pass_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [gradients[0]]


def packed_sizes(num_elements: int, double_quant: bool) -> dict[str, int]:
    """
    Bytes that bitsandbytes keeps for a 4-bit weight of so many elements, by tensor.

    Blocks of 64 share a float32 constant; double quantisation stores it in 8 bits, with a float32 constant and a
    code table of 256 float32 per blocks of 256 (bitsandbytes/functional.py, quantize_4bit).

    >>> sum(packed_sizes(4096 * 4096, True).values()) / 4096**2
    0.5159...
    """
    blocks = -(-num_elements // 64)
    sizes = {"packed weight": -(-num_elements // 2), "code": 16 * 4}
    if double_quant:
        sizes |= {
            "absmax": blocks,
            "absmax of absmax": -(-blocks // 256) * 4,
            "code of absmax": 256 * 4,
            "offset": 4,
        }
    else:
        sizes["absmax"] = blocks * 4
    return sizes
