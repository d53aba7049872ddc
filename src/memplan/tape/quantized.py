"""
Products with a weight that bitsandbytes stores in 4 or in 8 bits (bitsandbytes/autograd/_functions.py).

In 8 bits the threshold of outliers is LLM.int8()'s, 6.0, and no value of an input reaches it: how many columns have one
that does, only the data tells. Each adds a column of the input to what is held, and 10 bytes per output for a moment.
"""

from __future__ import annotations

from math import prod

from memplan.tape.graph import Graph
from memplan.tape.linear_layer import Linear
from memplan.tape.ops import cast
from memplan.tape.tensors import Gradients, Node, Tensor

FUNCTIONS_OWN_GRADIENTS = (2, 13)
"""
Since this torch a function of Python's has its gradients to itself, and they go when it returns; before, the engine had
them too, until what the function returned was validated (torch/csrc/autograd/python_function.cpp, PyNode::apply).
"""


def product(g: Graph, x: Tensor, layer: Linear) -> Tensor:
    """x (..., in) times the weight of a quantised layer: (..., out)."""
    return matmul_8bit(g, x, layer) if layer.has_8_bits else matmul_4bit(g, x, layer)


def matmul_4bit(g: Graph, x: Tensor, layer: Linear) -> Tensor:
    """
    MatMul4Bit: the weight is dequantised to the compute dtype for the product and thrown away, in forward and again in
    backward; nothing of the input is saved. Linear4bit gives its output the input's dtype (nn/modules.py). The product
    itself is a plain one that autocast sees.
    """
    dtype = x.dtype
    x = cast(g, x, layer.dtype)
    _convert_bias(g, layer, x.dtype)
    out = _plain_product(g, x, dequantized(g, layer), layer)
    if g.needs(x):
        g.record(out, (x,), [], _matmul_4bit_backward, (x.shape, layer))
        if layer.keeps_input:
            g.keep_until_graph_goes(x)
    return cast(g, out, dtype)


def _plain_product(g: Graph, x: Tensor, weight: Tensor, layer: Linear) -> Tensor:
    """By torch, inside an operation that autograd sees as one; `weight` has no other owner."""
    held = [_to_compute_dtype(g, weight), _to_compute_dtype(g, x)]
    dtype = held[1].dtype
    if layer.bias is not None:
        held.append(_to_compute_dtype(g, layer.bias))
    g.claim_workspace(bias=layer.bias is not None)
    out = g.new((*x.shape[:-1], layer.out_features), dtype, "output")
    while held:
        held.pop()
    return out


def _convert_bias(g: Graph, layer: Linear, dtype: str) -> None:
    """
    The layer gives its bias the dtype of its input, once and for good. Where FSDP has gathered it, that is a copy which
    FSDP does not know of, and which stays.
    """
    bias = layer.bias
    if bias is None or bias.dtype == dtype:
        return
    converted = g.new(bias.shape, dtype, f"{bias.name} in {dtype}", "weights")
    if g.units is not None:
        g.persistent.append(converted)
    else:
        bias.storage = converted.storage
    bias.dtype = dtype


def _to_compute_dtype(g: Graph, tensor: Tensor) -> Tensor:
    """Autocast's cast of an argument inside an operation that autograd sees as one."""
    dtype = g.autocast or tensor.dtype
    return tensor if tensor.dtype == dtype else g.new(tensor.shape, dtype, f"cast to {dtype}", "workspace")


def _matmul_4bit_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    shape, layer = node.extra
    dtype = gradients[0].dtype
    dequantised = dequantized(g, layer)
    weight = dequantised
    if dequantised.dtype != dtype:
        weight = g.new(dequantised.shape, dtype, f"weight cast to {dtype}", "workspace")
    del dequantised
    g.claim_workspace()
    out = g.new(shape, dtype, "grad of input")
    del weight
    if g.target.torch >= FUNCTIONS_OWN_GRADIENTS:
        gradients.clear()
    return [out]


def dequantized(g: Graph, layer: Linear) -> Tensor:
    """A 4-bit weight in the compute dtype; on the way, double quantisation's constants in float32."""
    shape = (layer.out_features, layer.in_features)
    if not layer.double_quant:
        return g.new(shape, layer.dtype, "dequantised weight", "workspace")
    constants = g.new((shape[0] * shape[1] // 64,), "float32", "quantisation constants", "workspace")
    weight = g.new(shape, layer.dtype, "dequantised weight", "workspace")
    del constants
    return weight


def matmul_8bit(g: Graph, x: Tensor, layer: Linear) -> Tensor:
    """
    MatMul8bitLt on CUDA, in 8 bits, with an output of the input's dtype that autocast does not touch; MatMul8bitFp on
    the CPU, a plain product. Both keep the input as an attribute of the node: no checkpoint drops it but one that has
    no graph until backward, and it stays until the graph goes.
    """
    _convert_bias(g, layer, x.dtype)
    if g.device == "cpu":
        out = _plain_product(g, x, _dequantized_8bit(g, layer, x.dtype), layer)
    else:
        out = _product_of_bytes(g, x, layer)
    if g.needs(x):
        g.record(out, (x,), [], _matmul_8bit_backward, (x.shape, x.dtype, layer))
        g.keep_until_graph_goes(x)
    return out


def _product_of_bytes(g: Graph, x: Tensor, layer: Linear) -> Tensor:
    """
    int8_vectorwise_quant of the input in float16, int8_linear_matmul, and int8_mm_dequant, which writes float16
    (bitsandbytes/backends/cuda/ops.py). cuBLASLt is given no workspace (csrc/ops.cu, igemmlt).
    """
    rows = prod(x.shape[:-1])
    half = x if x.dtype == "float16" else g.new(x.shape, "float16", "input in float16", "workspace")
    row_stats = g.new((rows,), "float32", "largest value of each row", "workspace")
    quantised = g.new(x.shape, "int8", "input in 8 bits", "workspace")
    magnitude = g.new(x.shape, "float16", "magnitude of input", "workspace")
    outliers = g.new(x.shape, "bool", "outliers of input", "workspace")
    del magnitude
    found = g.new((), "bool", "whether there are outliers", "workspace")
    del found
    if rows > 1:
        zero = g.new((), "int8", "0 for columns with outliers", "workspace")
        del zero
    del outliers, half
    shape = (*x.shape[:-1], layer.out_features)
    sums = g.new(shape, "int32", "output before scaling", "workspace")
    out = g.new(shape, "float16", "output in float16")
    if x.dtype != "float16":
        out = g.new(shape, x.dtype, "output")
    del sums, quantised, row_stats
    return out


def _matmul_8bit_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    """A plain product with the weight in the dtype that the input had."""
    shape, dtype, layer = node.extra
    gradient = gradients[0]
    if gradient.columns:
        gradient = g.new(gradient.shape, gradient.dtype, "contiguous copy of grad", "workspace")
    weight = _dequantized_8bit(g, layer, dtype)
    if gradient.dtype != dtype:
        gradient = g.new(gradient.shape, dtype, f"cast to {dtype}", "workspace")
    g.claim_workspace()
    out = g.new(shape, dtype, "grad of input")
    out.view = True
    del gradient, weight
    if g.target.torch >= FUNCTIONS_OWN_GRADIENTS:
        gradients.clear()
    return [out]


def _dequantized_8bit(g: Graph, layer: Linear, dtype: str) -> Tensor:
    """The bytes in `dtype`, multiplied in place by a constant per row."""
    weight = g.new((layer.out_features, layer.in_features), dtype, "dequantised weight", "workspace")
    scales = g.new((layer.out_features,), "float32", "scales of rows", "workspace")
    if g.device == "cpu" and dtype != "float32":
        # In float32, with the result in a tensor of its own (TensorIterator.cpp, compute_types).
        converted = [
            g.new(weight.shape, "float32", "operand or result in float32", "workspace") for _ in range(2)
        ]
        del converted
    del scales
    return weight
