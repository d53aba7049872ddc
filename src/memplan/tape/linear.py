"""
Linear layers: plain, quantised, with a low-rank adapter, and transformers' Conv1D.

A 3-D input is folded to a matrix, so every product is `mm`, or `addmm` where there is a bias
(aten/src/ATen/native/Linear.cpp). Both save what the other side's gradient needs.
"""

from __future__ import annotations

from memplan.tape.gptq import add_to_view, dequantised, recomputed, unpacked
from memplan.tape.graph import Graph
from memplan.tape.linear_layer import Adapter, Gptq, Linear
from memplan.tape.modules import called, hooked, left
from memplan.tape.ops import add, add_in_place, cast, dropout, scale
from memplan.tape.quantized import product
from memplan.tape.sharded import zero3_linear
from memplan.tape.sharded.fsdp1 import Fsdp1Units
from memplan.tape.tensors import Gradients, Node, Parameter, Tensor


def autocast_to(g: Graph, tensor: Tensor, *, keeps: bool = True) -> Tensor:
    """
    Autocast's cast of an argument; float32 leaves that train are cast once and kept until autocast ends. Not `keeps`:
    the argument is a view of the leaf.

    (aten/src/ATen/autocast_mode.cpp, cached_cast)
    """
    dtype = g.autocast
    if dtype is None or tensor.dtype not in ("float32", "float16", "bfloat16"):
        return tensor
    if keeps and isinstance(tensor, Parameter) and tensor.needs_grad and tensor.dtype == "float32":
        if id(tensor) not in g.autocast_cache:
            g.autocast_cache[id(tensor)] = (tensor.layer, cast(g, tensor, dtype))
        return g.autocast_cache[id(tensor)][1]
    return cast(g, tensor, dtype)


def matmul(
    g: Graph,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    *,
    conv: bool = False,
    transposes: bool = False,
) -> Tensor:
    """
    x (..., in) times a weight of any orientation: (..., out). The compiler evaluates autocast's arguments from the last
    to the first, and lets go of them from the first to the last: (x, weight, bias), or for Conv1D (bias, x, weight).
    """
    if bias is not None and not conv:
        bias = autocast_to(g, bias)
    weight = autocast_to(g, weight, keeps=not transposes)
    x = autocast_to(g, x)
    if bias is not None and conv:
        bias = autocast_to(g, bias)
    needed = g.needs(x, weight, bias)
    kept = [x if weight.needs_grad else None, weight if x.needs_grad else None]
    if bias is not None:
        kept.reverse()  # addmm lets go of the first operand first, mm of the second
    saved = g.save(*kept) if needed else None
    del kept
    g.claim_workspace(bias=bias is not None)
    out = g.new((*x.shape[:-1], out_features), x.dtype, "output")
    if saved is not None:
        extra = (x.shape, weight.shape, conv)
        node = g.record(
            out, (x, weight) if bias is None else (bias, x, weight), saved, _matmul_backward, extra
        )
        node.leaves_first = bias is not None
    if conv:
        del bias
    return out


def _matmul_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """
    mm: the weight's gradient first, then the input's; addmm the other way round, and the bias gets the gradient
    itself, summed over rows. Both are views: the product is of the folded matrix and the weight's transpose.
    """
    gradient = gradients[0]
    x_shape, weight_shape, conv = node.extra
    edge_x, edge_weight = node.edges[-2:]
    has_bias = len(node.edges) > 2
    if gradient.columns and x_shape[0] > 1:
        # Rows of several sequences whose channels are strided cannot be seen as one matrix.
        gradients[0] = gradient = g.new(gradient.shape, gradient.dtype, "contiguous copy of grad")
    g.claim_workspace()
    grad_x = grad_weight = None
    for wanted in ("input", "weight") if has_bias else ("weight", "input"):
        if wanted == "weight" and edge_weight is not None:
            grad_weight = g.new(weight_shape, gradient.dtype, "grad of weight")
            grad_weight.view = not conv
        elif wanted == "input" and edge_x is not None:
            grad_x = g.new(x_shape, gradient.dtype, "grad of input")
            grad_x.view = len(x_shape) > 2
    if not has_bias:
        return [grad_x, grad_weight]
    return [gradient if node.edges[0] is not None else None, grad_x, grad_weight]


def linear(g: Graph, x: Tensor, layer: Linear) -> Tensor:
    """The layer as transformers calls it, with its adapter if it has one."""
    with g.module(layer.name):
        if layer.adapter is None:
            return _base(g, x, layer)
        if g.hooks is not None:
            x = g.hooks.enter((layer.name, g.layer), x) or x
        return left(g, layer.name, _with_adapter(g, x, layer, layer.adapter))


def _base(g: Graph, x: Tensor, layer: Linear) -> Tensor:
    if layer.gptq is not None:
        return _gptq_product(g, x, layer, layer.gptq)
    if layer.quantized:
        return product(g, x, layer)
    weight = layer.current_weight(g)
    bias = (
        layer.bias if layer.rows is None else None
    )  # peft takes the weight alone (trainable_tokens/layer.py)
    return linear_module(g, x, weight, bias, layer.out_features, conv=layer.conv, transposes=layer.transposes)


def _gptq_product(g: Graph, x: Tensor, layer: Linear, gptq: Gptq) -> Tensor:
    held: list[Tensor] = []  # what the layer's own code has in its variables
    if gptq.kernel == "triton":
        out = recomputed(g, x, layer)
    else:
        held += [dequantised(g, layer)] if gptq.kernel == "compiled" else unpacked(g, layer)
        if gptq.kernel == "compiled":
            held[0] = cast(g, held[0], x.dtype)
        out = matmul(g, x, held[0], None, layer.out_features)
        out.view = True  # of the product of a matrix
    if gptq.bias is not None:
        adds = add_to_view if gptq.kernel == "compiled" else add
        out = adds(g, out, gptq.bias, "output with bias")
    held.clear()
    return out


@hooked
def linear_module(
    g: Graph,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    *,
    conv: bool = False,
    transposes: bool = False,
) -> Tensor:
    """`matmul` as a module of its own; ZeRO's stage 3 replaces F.linear, and what is not that it does not."""
    if g.hooks is not None and not conv and not transposes:
        return zero3_linear.matmul(g, x, weight, bias, out_features)
    return matmul(g, x, weight, bias, out_features, conv=conv, transposes=transposes)


def _with_adapter(g: Graph, x: Tensor, layer: Linear, adapter: Adapter) -> Tensor:
    """
    peft's lora.Linear.forward (lora.bnb.Linear4bit for 4-bit layers, which copies the base's output first and casts
    the adapter's output back before the sum; lora.bnb.Linear8bitLt, which casts alone; lora.gptq.GPTQLoraLinear, since
    0.16 as lora.Linear, before that without a cast under autocast, and with a sum in place).
    """
    adds = add_in_place if layer.adds_in_place else add
    result = _base(g, x, layer)
    dtype = result.dtype
    if layer.gptq is not None and layer.gptq.adds_in_place:
        converts = g.autocast is None
        if converts:
            x = cast(g, x, adapter.asked_dtype)
        output = _product_of_adapter(g, x, adapter)
        if converts:
            output = cast(g, output, dtype)
        output = scale(g, output, "scaled adapter output")
        is_view = layer.gptq.bias is None or layer.gptq.kernel == "compiled"
        return (add_to_view if is_view else add_in_place)(g, result, output, "output")
    if layer.quantized and layer.gptq is None:
        if not layer.has_8_bits:
            result = _clone(g, result)
        # peft asks for autocast on CUDA, whatever the device is.
        converts = g.autocast is None or g.device == "cpu"
        if converts:
            x = cast(g, x, adapter.asked_dtype)
        output = _low_rank(g, x, adapter)
        if converts:
            output = cast(g, output, dtype)
        result = adds(g, result, output, "output")
        return result
    if g.hooks is not None:  # peft asks for the dtype of A, which is another module's
        g.hooks.touch((layer.name, g.layer), adapter.a)
    x = cast(g, x, adapter.asked_dtype)
    result = adds(g, result, _low_rank(g, x, adapter), "sum with adapter")
    result = cast(g, result, dtype)
    return result


def _low_rank(g: Graph, x: Tensor, adapter: Adapter) -> Tensor:
    return scale(g, _product_of_adapter(g, x, adapter), "scaled adapter output")


def _product_of_adapter(g: Graph, x: Tensor, adapter: Adapter) -> Tensor:
    return _lora_b(g, _lora_a(g, _lora_dropout(g, x, adapter), adapter), adapter)


@called("lora_dropout")
def _lora_dropout(g: Graph, x: Tensor, adapter: Adapter) -> Tensor:
    return dropout(g, x, adapter.dropout)


def _lora_a(g: Graph, x: Tensor, adapter: Adapter) -> Tensor:
    with g.module("lora_A"):
        return _matrix(g, x, adapter.a)


def _lora_b(g: Graph, x: Tensor, adapter: Adapter) -> Tensor:
    with g.module("lora_B"):
        return _matrix(g, x, adapter.b)


def _matrix(g: Graph, x: Tensor, weight: Parameter) -> Tensor:
    """One of an adapter's two, which FSDP1 may have as a unit of its own."""
    if isinstance(g.units, Fsdp1Units):
        return g.units.around_matrix(weight, lambda: linear_module(g, x, weight, None, weight.shape[0]))
    return linear_module(g, x, weight, None, weight.shape[0])


def _clone(g: Graph, x: Tensor) -> Tensor:
    out = g.new(x.shape, x.dtype, "copy")
    if g.needs(x):
        g.record(out, (x,), [], _pass_backward)
    return out


def _pass_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [gradients[0]]
