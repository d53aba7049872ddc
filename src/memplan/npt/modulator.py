"""
What is trained in an NPT block: the tensors that turn a token's attention output into a change of the MLP's
first weight for that token.

Shapes in comments: `...` any leading dimensions (batch, tokens), d hidden size, f intermediate size, r rank.
"""

from __future__ import annotations

import torch
from torch import nn


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class DiagonalModulator(nn.Module):
    """
    Weight delta of rank r with a diagonal core that the attention output `a` sets, for A (d, r) and B (r, f):

        m(a)          = scale * tanh(a A)
        delta_W(a)^T  = A diag(m(a)) B
        delta(x, a)   = x delta_W(a)^T = ((x A) * m(a)) B

    The last form needs r numbers per token where delta_W needs d * f. The delta is odd in `a`.

    A ~ N(0, 1/d) and B = 0: the delta starts at zero and the gradient of B at full size, as in LoRA. Small
    random values in both make the first gradients vanish. The values are drawn on the CPU, so that a seed
    gives the same ones on every device.
    """

    variant = "diag"

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        rank: int,
        scale: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        A = torch.randn(hidden_size, rank, generator=generator) * hidden_size**-0.5
        self.A = nn.Parameter(A.to(device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(rank, intermediate_size, device=device, dtype=dtype))

    def encode(self, a: torch.Tensor) -> torch.Tensor:
        """
        m(a), (..., r), of attention outputs (..., d).

        In float32 on a 16-bit base: r numbers per token cost nothing, and products of small factors would
        leave the range of float16.
        """
        z = a @ self.A.to(a.dtype)
        return self.scale * torch.tanh(at_least_float32(z))

    def low_rank(self, x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """(x A) * m, (..., r): delta(x, a) before the multiplication by B. In the dtype of `m`."""
        v = x @ self.A.to(x.dtype)
        return v * m

    def weight_delta(self, m: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """delta_W^T, (..., d, f): d * f elements per token, what `low_rank` exists to avoid."""
        scaled = self.A.to(dtype) * m.to(dtype).unsqueeze(-2)
        return scaled @ self.B.to(dtype)

    def squared_norm(self, m: torch.Tensor) -> torch.Tensor:
        """
        Squared Frobenius norm of every token's delta_W, (...), by Gram matrices of r * r elements:
        ||A diag(m) B||^2 = m ((A^T A) * (B B^T)) m^T.
        """
        A = at_least_float32(self.A)
        B = at_least_float32(self.B)
        gram = (A.T @ A) * (B @ B.T)
        return ((m @ gram) * m).sum(-1)

    def extra_repr(self) -> str:
        hidden_size, rank = self.A.shape
        return (
            f"variant={self.variant}, d={hidden_size}, f={self.B.shape[1]}, rank={rank}, scale={self.scale}"
        )
