"""bitsandbytes' operations on meta tensors: packing of weights in 4 and 8 bits, and products with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memplan.tracing.recorder import Handler, Recorder


def _packed_product(recorder: Recorder, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    A 4-bit weight is unpacked for the product, whatever the trace's backend does: bitsandbytes has a kernel that need
    not, but takes it for few tokens only (backends/cuda/ops.py, gemm_4bit: never beyond 1536).
    """
    if recorder.device_type != "meta":
        return NotImplemented
    named = dict(zip(_PACKED_ARGUMENTS, args)) | kwargs
    inputs, constants, bits = named["A"], named["absmax"], torch.ops.bitsandbytes
    with recorder:
        if named.get("absmax_8bit") is not None:
            nested = (named["absmax_8bit"], constants, named["absmax_code"], 256, torch.float32)
            constants = bits.dequantize_blockwise.default(*nested)
            constants += named["absmax_offset"]
        packing = (named["blocksize"], named["quant_type"], named["shapeB"], inputs.dtype)
        weight = bits.dequantize_4bit.default(named["B"], constants, *packing)
        del constants
        rows, bias = inputs.reshape(-1, inputs.shape[-1]), named.get("bias")
        out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*inputs.shape[:-1], -1)


def _pack(
    recorder: Recorder, _: Any, args: tuple[Any, ...], __: dict[str, Any]
) -> tuple[Tensor, Tensor] | Any:
    """The constants are made before the packed weight (bitsandbytes' backends/cuda/ops.py, quantize_4bit)."""
    if recorder.device_type != "meta":
        return NotImplemented
    weight, block_size, _, storage = args
    with recorder:
        num_elements = weight.numel()
        constants = weight.new_empty(-(-num_elements // block_size), dtype=torch.float32)
        packed = weight.new_empty(((num_elements + 1) // (storage.itemsize * 2), 1), dtype=storage)
    return packed, constants


def _pack_constants(
    recorder: Recorder, _: Any, args: tuple[Any, ...], __: dict[str, Any]
) -> tuple[Tensor, Tensor] | Any:
    """As `_pack`, in 8 bits (quantize_blockwise there)."""
    if recorder.device_type != "meta":
        return NotImplemented
    values, _, block_size = args
    with recorder:
        constants = values.new_empty(-(-values.numel() // block_size), dtype=torch.float32)
        packed = torch.empty_like(values, dtype=torch.uint8)
    return packed, constants


def _quantize_rows(recorder: Recorder, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    8 bits and a constant per row, by bitsandbytes' CUDA code without its kernel (backends/cuda/ops.py,
    int8_vectorwise_quant), or the CPU's, for weights (backends/default/ops.py). With a threshold it looks for outliers:
    here there are none.
    """
    if recorder.device_type != "meta":
        return NotImplemented
    inputs, threshold = args[0], args[1] if len(args) > 1 else kwargs.get("threshold", 0.0)
    with recorder:
        if not recorder.kernel_scratch:
            stats = torch.max(inputs.abs(), dim=1).values.float()
            return torch.round(inputs * (127.0 / stats.unsqueeze(-1))).to(torch.int8), stats, None
        rows = inputs.numel() // inputs.shape[-1]
        stats = torch.empty(rows, dtype=torch.float32, device=inputs.device)
        quantised = torch.empty(inputs.shape, dtype=torch.int8, device=inputs.device)
        columns = None
        if threshold > 0:
            outliers = inputs.abs() >= threshold
            outliers.any()
            columns = torch.empty(0, dtype=torch.int64, device=inputs.device)
            if rows > 1:
                quantised[:, columns] = 0
    return quantised, stats, columns


def _multiply_bytes(recorder: Recorder, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As int8_mixed_scaled_mm without outliers, whose kernel writes float16 (backends/default/ops.py, cuda/ops.py)."""
    if recorder.device_type != "meta":
        return NotImplemented
    named = dict(zip(_BYTES_ARGUMENTS, args)) | kwargs
    inputs, weight, bias = named["A"], named["CB"], named.get("bias")
    with recorder:
        rest = torch.empty(0, dtype=inputs.dtype, device=inputs.device)
        sums = torch.empty((*inputs.shape[:-1], weight.shape[0]), dtype=torch.int32, device=inputs.device)
        out = torch.empty_like(sums, dtype=torch.float16)
        if bias is not None and bias.dtype != torch.float16:
            out.add_(bias)
        out = out.to(inputs.dtype)
    return out, rest


_BYTES_ARGUMENTS = ("A", "CA", "CB", "SCA", "SCB", "outlier_cols", "bias")

_PACKED_ARGUMENTS = (
    "A", "B", "shapeB", "absmax", "blocksize", "quant_type", "bias", "absmax_8bit", "absmax_code", "absmax_offset",
)  # fmt: skip


HANDLERS: dict[str, Handler] = {
    "bitsandbytes::gemm_4bit": _packed_product,
    "bitsandbytes::quantize_4bit": _pack,
    "bitsandbytes::quantize_blockwise": _pack_constants,
    "bitsandbytes::int8_vectorwise_quant": _quantize_rows,
    "bitsandbytes::int8_mixed_scaled_mm": _multiply_bytes,
}
"""By operator name, what runs instead of it."""


def product_with_bytes(
    A: Tensor, B: Tensor, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None
) -> Any:
    """bitsandbytes' `matmul` in training on a CPU, which multiplies with a weight made of the bytes."""
    from bitsandbytes.autograd._functions import MatMul8bitFp

    return MatMul8bitFp.apply(A, B, out, bias, state)
