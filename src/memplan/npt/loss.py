"""The equivalence loss: mean square of an NPT block's error over the elements of the tokens that count."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def mean_square(values: torch.Tensor, num_elements: int | torch.Tensor) -> torch.Tensor:
    """
    Sum of squares over `num_elements`, a scalar in float32 or wider.

    The norm widens while it reads, on CUDA without a float32 copy (`aten/src/ATen/native/ReduceOpsUtils.h`,
    `make_reduction`), and float16 squares would overflow above 255.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(values, dim=-1, dtype=wide).square().sum() / num_elements


class EquivalenceLoss(torch.autograd.Function):
    """
    Mean of (output - target)^2 over the elements of all tokens that are not padding; a scalar in float32 or
    wider.

    Same value and gradient as `F.mse_loss` of float32 copies. Written by hand for memory: what is kept for
    backward is one tensor like `output` in its own dtype, where the composed form keeps two float32 ones; and
    the gradient is computed in float32, loss scale included, and rounded once.

    output, target: (B, S, d). padding: (B, S) bool, True for tokens that do not count, or None. num_elements:
    number of elements that count, an int or a scalar tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        target: torch.Tensor,
        padding: torch.Tensor | None,
        num_elements: int | torch.Tensor,
    ) -> torch.Tensor:
        error = output - target
        if padding is not None:
            error.masked_fill_(padding.unsqueeze(-1), 0.0)
        ctx.save_for_backward(error)
        ctx.num_elements = num_elements
        ctx.output_dtype = output.dtype
        return mean_square(error, num_elements)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (error,) = ctx.saved_tensors
        coefficient = 2.0 * grad / ctx.num_elements
        # One element in one dimension, not a scalar: scalars do not widen a float16 tensor.
        return (error * coefficient.view(1)).to(ctx.output_dtype), None, None, None
