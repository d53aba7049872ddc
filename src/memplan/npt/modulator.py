"""
What is trained in an NPT block: the tensors that turn a token's attention output into a change of one of the
MLP's matrices for that token.

Shapes in comments: `...` any leading dimensions (batch, tokens), d hidden size, f intermediate size, r rank,
k components, R features: r for `diag`, k * r for `outer`.
"""

from __future__ import annotations

import torch
from torch import nn

from memplan.job.spec import Npt

SMALL_STD = 0.01
"""Size of the small random values of `npt.initialization: small`."""


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def make_modulator(
    npt: Npt,
    hidden_size: int,
    intermediate_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
    is_gated: bool = True,
) -> Modulator:
    """
    The modulator that the fields of `npt` describe, for a weight of (intermediate_size, hidden_size). It carries others
    for other matrices of the MLP: `up` for a second one of that shape, which a gated MLP has (`target: gate_up`), and
    with `target: all` that and `down` for the last one, (hidden_size, intermediate_size).
    """
    cls = {"diag": DiagonalModulator, "linear": LinearModulator, "outer": OuterModulator}[npt.variant]

    def make(in_features: int, out_features: int) -> Modulator:
        return cls(
            npt, in_features, out_features, hidden_size, dtype=dtype, device=device, generator=generator
        )

    made = make(hidden_size, intermediate_size)
    if npt.target == "gate_up" or (npt.target == "all" and is_gated):
        made.up = make(hidden_size, intermediate_size)
    if npt.target == "all":
        made.down = make(intermediate_size, hidden_size)
    return made


class Modulator(nn.Module):
    """
    Weight delta of low rank. A token's attention output `a` becomes a small `code`; with it, delta_W is never
    needed:

        delta(x, a) = x delta_W(a)^T + delta_b(a) = low_rank(x, encode(a)) B

    delta_b, a change of the layer's bias, is there with `npt.bias`: x is then read as x A + bias.

    The values are drawn on the CPU, so that a seed gives the same ones on every device.
    """

    A: nn.Parameter
    """(d, R), reads x; (f, R) for the MLP's last matrix"""
    B: nn.Parameter
    """(R, f); (R, d) for the MLP's last matrix"""
    bias: nn.Parameter | None
    """(R,), ones at the start"""
    up: Modulator | None
    """That of a gated MLP's second input matrix."""
    down: Modulator | None
    """That of the MLP's last matrix."""

    def __init__(
        self,
        npt: Npt,
        in_features: int,
        out_features: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.npt = npt
        self.up = self.down = None
        drawn = self.draw(in_features, out_features, hidden_size, generator)
        num_features = len(drawn["B"])
        self.bias = nn.Parameter(torch.ones(num_features, dtype=dtype, device=device)) if npt.bias else None
        made = {name: nn.Parameter(values.to(device=device, dtype=dtype)) for name, values in drawn.items()}
        for name in sorted(made):
            self.register_parameter(name, made[name])

    def draw(
        self, in_features: int, out_features: int, hidden_size: int, generator: torch.Generator | None
    ) -> dict[str, torch.Tensor]:
        """First values of the tensors by name, in the order in which they get their memory."""
        raise NotImplementedError

    def encode(self, a: torch.Tensor) -> torch.Tensor:
        """
        The code (..., R) of attention outputs (..., d).

        In float32 on a 16-bit base: R numbers per token cost nothing, and products of small factors would
        leave the range of float16.
        """
        raise NotImplementedError

    def low_rank(self, x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """delta(x, a) before the multiplication by B, (..., R), in the dtype of `code`."""
        read = x @ self.A.to(x.dtype)
        if self.bias is not None:
            read = read + self.bias
        return self.modulate(read, code)

    def modulate(self, read: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """What was read of x, or of the constant one, (..., R) or (R,), as the code changes it: (..., R)."""
        raise NotImplementedError

    def weight_delta(self, code: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """delta_W^T, (..., d, f): d * f elements per token, what `low_rank` exists to avoid."""
        raise NotImplementedError

    def bias_delta(self, code: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """delta_b, (..., f)."""
        if self.bias is None:
            return None
        return self.modulate(self.bias, code).to(dtype) @ self.B.to(dtype)

    def squared_norm(self, code: torch.Tensor) -> torch.Tensor:
        """Size of every token's delta_W, (...), without building it: see the variants."""
        raise NotImplementedError

    def settings(self) -> dict[str, str | int | float | bool]:
        """The fields of the job's `npt` that the tensors belong to."""
        return {"variant": self.npt.variant, "target": self.npt.target, "bias": self.npt.bias}

    def extra_repr(self) -> str:
        shape = f"d={self.A.shape[0]}, f={self.B.shape[1]}"
        return ", ".join([shape, *(f"{name}={value}" for name, value in self.settings().items())])


def _uniform(*shape: int, bound: float, generator: torch.Generator | None) -> torch.Tensor:
    return bound * (2.0 * torch.rand(shape, generator=generator) - 1.0)


class CoreModulator(Modulator):
    """
    A diagonal core: delta_W(a)^T = A diag(code) B.
    """

    def modulate(self, read: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return read * code

    def weight_delta(self, code: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scaled = self.A.to(dtype) * code.to(dtype).unsqueeze(-2)
        return scaled @ self.B.to(dtype)

    def squared_norm(self, code: torch.Tensor) -> torch.Tensor:
        """
        Squared Frobenius norm, by Gram matrices of r * r elements:
        ||A diag(m) B||^2 = m ((A^T A) * (B B^T)) m^T.
        """
        A = at_least_float32(self.A)
        B = at_least_float32(self.B)
        gram = (A.T @ A) * (B @ B.T)
        return ((code @ gram) * code).sum(-1)

    def draw(
        self, in_features: int, out_features: int, hidden_size: int, generator: torch.Generator | None
    ) -> dict[str, torch.Tensor]:
        npt = self.npt
        drawn = {
            name: torch.randn(size, npt.rank, generator=generator) * size**-0.5
            for name, size in self.read_sizes(in_features, hidden_size).items()
        }
        B = torch.zeros(npt.rank, out_features)
        if npt.initialization == "small":
            for reader in drawn.values():
                reader *= SMALL_STD
            B = torch.randn(B.shape, generator=generator) * (SMALL_STD * npt.rank**-0.5)
        return drawn | {"B": B}

    def read_sizes(self, in_features: int, hidden_size: int) -> dict[str, int]:
        """Of the tensors that read, the number of features that each of them reads."""
        return {"A": in_features}

    def settings(self) -> dict[str, str | int | float | bool]:
        return super().settings() | {"rank": self.npt.rank}


class LinearModulator(CoreModulator):
    """
    A diagonal core that is linear in the attention output, read by a matrix of its own; for A (in, r), B (r, out) and
    C (d, r):

        delta_W(a)^T  = A diag(a C) B
        delta(x, a)   = ((x A) * (a C)) B

    With a bias, ((x A + bias) * (a C)) B: that holds every linear map of `a` of rank r. Odd in `a`. A ~ N(0, 1/in),
    C ~ N(0, 1/d) and B = 0; with initialization `small` all three are small, as in `DiagonalModulator`.
    """

    C: nn.Parameter
    """(d, R), reads the attention output"""

    def read_sizes(self, in_features: int, hidden_size: int) -> dict[str, int]:
        return super().read_sizes(in_features, hidden_size) | {"C": hidden_size}

    def encode(self, a: torch.Tensor) -> torch.Tensor:
        z = a @ self.C.to(a.dtype)
        return at_least_float32(z)


class DiagonalModulator(CoreModulator):
    """
    A diagonal core that the attention output sets, for A (d, r) and B (r, f):

        m(a)          = scale * tanh(a A)
        delta_W(a)^T  = A diag(m(a)) B
        delta(x, a)   = ((x A) * m(a)) B

    The delta is odd in `a`. A ~ N(0, 1/d) and, with initialization `zero`, B = 0: the delta starts at zero and
    the gradient of B at full size, as in LoRA. With `small`, A ~ N(0, 1e-4/d) and B ~ N(0, 1e-4/r): the first
    gradients all but vanish.
    """

    def encode(self, a: torch.Tensor) -> torch.Tensor:
        z = a @ self.A.to(a.dtype)
        return self.npt.modulation_scale * torch.tanh(at_least_float32(z))

    def settings(self) -> dict[str, str | int | float | bool]:
        return super().settings() | {"modulation_scale": self.npt.modulation_scale}


class OuterModulator(Modulator):
    """
    A sum of k outer products of vectors that the attention output gives, for A (in, k r), C (d, k r) and B (k r, out);
    A_j, B_j, C_j are the columns (rows, for B) of component j:

        z_j           = a C_j                               (..., r)
        delta_W(a)^T  = sum_j (A_j z_j^T) (z_j B_j)         k outer products of d and f numbers
        delta(x, a)   = [c_1 z_1, ..., c_k z_k] B           c_j = <z_j, x A_j>

    The last line needs k r numbers per token, where the vectors of the second need k (d + f) and their
    product d * f. The delta is even in `a`.

    C is uniform as Xavier's for each component. With initialization `zero`, A ~ N(0, 1/d) and B = 0. With
    `small`, A and B are uniform in +-0.01.
    """

    C: nn.Parameter
    """(d, R), reads the attention output"""

    def draw(
        self, in_features: int, out_features: int, hidden_size: int, generator: torch.Generator | None
    ) -> dict[str, torch.Tensor]:
        npt = self.npt
        features = npt.components * npt.rank
        xavier = (6.0 / (hidden_size + npt.rank)) ** 0.5
        C = _uniform(hidden_size, features, bound=xavier, generator=generator)
        if npt.initialization == "small":
            A = _uniform(in_features, features, bound=SMALL_STD, generator=generator)
            B = _uniform(features, out_features, bound=SMALL_STD, generator=generator)
        else:
            A = torch.randn(in_features, features, generator=generator) * in_features**-0.5
            B = torch.zeros(features, out_features)
        return {"A": A, "B": B, "C": C}

    def encode(self, a: torch.Tensor) -> torch.Tensor:
        z = a @ self.C.to(a.dtype)
        return at_least_float32(z)

    def modulate(self, read: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        z = self._by_component(code)
        c = (z * self._by_component(read)).sum(-1, keepdim=True)
        return (c * z).flatten(-2)

    def weight_delta(self, code: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        z = self._by_component(code.to(dtype))
        A = self._by_component(self.A.to(dtype))
        B = self.B.to(dtype).unflatten(0, (self.npt.components, -1))
        left = torch.einsum("...kr,dkr->...dk", z, A)
        right = torch.einsum("...kr,krf->...kf", z, B)
        return left @ right

    def squared_norm(self, code: torch.Tensor) -> torch.Tensor:
        """
        Squared Frobenius norms of the components, summed: sum_j |A_j z_j|^2 |z_j B_j|^2, each factor by a Gram
        matrix of r * r elements. With one component that is the norm of delta_W.
        """
        A = self._by_component(at_least_float32(self.A)).transpose(0, 1)
        B = at_least_float32(self.B).unflatten(0, (self.npt.components, -1))
        z = self._by_component(code).flatten(0, -3).transpose(0, 1)
        left = ((z @ (A.mT @ A)) * z).sum(-1)
        right = ((z @ (B @ B.mT)) * z).sum(-1)
        return (left * right).sum(0).view(code.shape[:-1])

    def _by_component(self, features: torch.Tensor) -> torch.Tensor:
        """(..., k r) as (..., k, r)."""
        return features.unflatten(-1, (self.npt.components, -1))

    def settings(self) -> dict[str, str | int | float | bool]:
        return super().settings() | {"rank": self.npt.rank, "components": self.npt.components}
