"""
Unsloth's LoRA operations over 4-bit layers, as fms-acceleration runs them: one autograd function for q, k and
v, one for the output projection (plugins/fused-ops-and-kernels/.../unsloth_lora/bnb/fast_lora.py, gptq/fast_lora.py).

The adapter's casts are made for each use, outside autocast's cache; the gradient of the input of q, k and v is
written over that input where bitsandbytes has packed the weights.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.tape.gptq import dequantised
from memplan.tape.graph import Graph
from memplan.tape.linear_layer import Adapter, Linear
from memplan.tape.ops import alias, cast
from memplan.tape.parts import Block
from memplan.tape.quantized import dequantized
from memplan.tape.tensors import Gradients, Node, Tensor

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = "self_attn.o_proj"


def fuses(block: Block, *paths: str) -> bool:
    """Whether these layers of a block are 4-bit with adapters."""
    return all(block.linears[path].quantized and block.linears[path].adapter is not None for path in paths)


def fused_qkv(g: Graph, x: Tensor, block: Block) -> list[Tensor]:
    """LoRA_QKV.apply: x (B, S, d) to (B, S, out) each."""
    layers = [block.linears[path] for path in QKV]
    with g.module("self_attn.qkv_proj"):
        return _apply(g, x, layers, _qkv_backward)


def fused_output(g: Graph, x: Tensor, block: Block) -> Tensor:
    """LoRA_W.apply of the output projection."""
    with g.module(OUTPUT):
        return _apply(g, x, [block.linears[OUTPUT]], _output_backward)[0]


def _apply(g: Graph, x: Tensor, layers: list[Linear], backward: Callable[..., Gradients]) -> list[Tensor]:
    adapters = [_adapter(layer) for layer in layers]
    dtype = x.dtype
    with g.no_grad():
        # The module for GPTQ dequantises all of them first, that for bitsandbytes each in its product.
        held = [dequantised(g, layer) for layer in layers if layer.gptq is not None]
        pairs = [_matmul_lora(g, x, layer) for layer in layers]
        del held
    outputs = [out for out, _ in pairs]
    inputs = (x, *(tensor for adapter in adapters for tensor in (adapter.a, adapter.b)))
    if g.needs(*inputs):
        saved = [x, *(dropped for _, dropped in pairs)]
        node = g.record(outputs[0], inputs, saved, backward, (layers, dtype))
        for slot, out in enumerate(outputs):
            out.node, out.slot, out.needs_grad = node, slot, True
    return outputs


def _adapter(layer: Linear) -> Adapter:
    assert layer.adapter is not None
    return layer.adapter


def _matmul_lora(g: Graph, x: Tensor, layer: Linear) -> tuple[Tensor, Tensor]:
    """Output, and the input as the adapter saw it."""
    adapter = _adapter(layer)
    weight = dequantized(g, layer) if layer.gptq is None else None
    g.claim_workspace()
    out = g.new((*x.shape[:-1], layer.out_features), x.dtype, "output")
    del weight
    dropped = x
    if adapter.dropout and g.training:
        mask = g.new(x.shape, "bool", "dropout mask")
        dropped = g.new(x.shape, x.dtype, "dropout")
        del mask
    product = _low_rank(g, adapter, x.shape[:-1], layer.out_features, x.dtype)
    del product
    return out, dropped


def _low_rank(g: Graph, adapter: Adapter, rows: tuple[int, ...], columns: int, dtype: str) -> Tensor:
    """x @ A @ (scale * B), or its transpose's: a product of (rows, columns)."""
    first = cast(g, adapter.a, dtype)
    low = g.new((*rows, adapter.a.shape[0]), dtype, "low-rank product")
    del first
    second = cast(g, adapter.b, dtype)
    scaled = g.new(adapter.b.shape, dtype, "scaled B")
    del second
    out = g.new((*rows, columns), dtype, "adapter output")
    del low, scaled
    return out


def _adapter_gradients(g: Graph, adapter: Adapter, gradient: Tensor) -> tuple[Tensor, Tensor]:
    rank, rows = adapter.a.shape[0], gradient.shape[:-1]
    low = g.new((*rows, rank), gradient.dtype, "low-rank grad")
    grad_a = g.new(adapter.a.shape, gradient.dtype, "grad of A")
    del low
    low = g.new((*rows, rank), gradient.dtype, "low-rank product")
    grad_b = g.new(adapter.b.shape, gradient.dtype, "grad of B")
    del low
    return grad_a, grad_b


def _add_masked(g: Graph, adapter: Adapter, shape: tuple[int, ...], dtype: str) -> None:
    """`dX += (dropped != 0) * (dY @ B.T @ A.T)`"""
    kept = g.new(shape, "bool", "kept by dropout")
    product = _low_rank(g, adapter, shape[:-1], shape[-1], dtype)
    masked = g.new(shape, dtype, "masked adapter grad")
    del product, kept, masked


def _qkv_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    layers, dtype = node.extra
    x = saved[0]
    assert x is not None
    outputs: Gradients = []
    for slot, layer in enumerate(layers):
        outputs += _adapter_gradients(g, _adapter(layer), gradients[slot])
    grad_x = None
    for layer in layers:
        weight = _weight(g, layer)
        part = None
        if grad_x is None:  # the module for bitsandbytes writes it over the input
            grad_x = alias(x) if layer.gptq is None else g.new(x.shape, dtype, "grad of input")
        else:
            part = g.new(x.shape, dtype, "grad of input")
        del part, weight
        _add_masked(g, _adapter(layer), x.shape, dtype)
    return [grad_x, *outputs]


def _weight(g: Graph, layer: Linear) -> Tensor:
    return dequantized(g, layer) if layer.gptq is None else dequantised(g, layer)


def _output_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    (layer,), dtype = node.extra
    x = saved[0]
    assert x is not None
    grad_a, grad_b = _adapter_gradients(g, _adapter(layer), gradients[0])
    weight = _weight(g, layer)
    grad_x = g.new(x.shape, dtype, "grad of input")
    del weight
    _add_masked(g, _adapter(layer), x.shape, dtype)
    return [grad_x, grad_a, grad_b]
