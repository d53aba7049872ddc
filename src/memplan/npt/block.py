"""
The NPT block: a transformers decoder block whose attention acts on the MLP's first weight instead of on the
residual.

    original                                  NPT
    a   = Attn(LN1(h))                        a   = Attn(LN1(h))
    x   = LN2(h + a)                          x   = LN2(h)
    out = h + a + MLP(x)                      out = h + MLP'(x, a)

MLP' adds delta(x, a) to what the MLP's first matrix gives (see `modulator`), or both input matrices of a gated
MLP. Weights, norms, attention and hooks are those of the original block: conversion swaps the block's class and
adds the module `np`.

Modes of a block: `npt` (above), `base` (the original, bit for bit), and `local`: layer-wise equivalence
training, where the block computes both MLP branches from one attention output, compares them, and runs its
backward pass before it returns. No gradient passes through attention or between blocks, so only one block's
graph is ever alive.

Letters: B sequences, S tokens each, N = B * S, d hidden size, f intermediate size, r rank; c is the dtype in
which the base computes. `local` allocates in this order, form `factored`, variant `diag`; [ ] is a no-op where
c is float32. Variants `linear` and `outer` have z [in float32] for m, `outer` c and u for u; every further matrix
repeats z to R_F, and v to pre at its place. "saved" is what autograd keeps; everything else is freed after its last
use below.

    teacher, no graph
      a            LN1(h), the attention                                            N d       c
      residual     h + a                                                            N d       c
      branch       LN2(residual), the MLP (Llama: 3 N f alive, GPT-2: 4)            N d       c
      target       a + branch                                                       N d       c
      out          residual + branch; teacher stream only                           N d       c
      x            LN2(h)                                                           N d       c
    student, with graph
      [A]          A in c                                                           d r       c
      z            a @ A                                                            N r       c    saved: a
      [z]          z in float32                                                     N r       f32
      tanh         tanh(z)                                                          N r       f32  saved
      m            scale * tanh                                                     N r       f32  saved
      R_F          A^T A, B B^T and their product; m @ it and that * m; its sums    3 r r, 2 N r, N f32  saved
      gate         first matrix of the MLP, of x                                    N f       c
      [A]          A in c: a second cast, so that A's gradients add in float32      d r       c
      v            x @ A                                                            N r       c    saved: v, x
      u            v * m                                                            N r       f32
      [u], [B]     u and B in c                                                     N r, r f  c    saved
      pre          addmm(gate, u, B)                                                N f       c    saved
      act          act(pre); GPT-2's gelu_new saves three more N f                  N f       c
      up           gated MLPs: up_proj(x)                                           N f       c    saved
      product      gated MLPs: act * up                                             N f       c
      y            last matrix of the MLP                                           N d       c
      error        y - target                                                       N d       c    saved
      loss         norms of the rows of error and target: N each                              f32
      out          h + y; student stream only                                       N d       c
    backward, at once; what was saved is freed as its operation is done
      g_y          error * coefficient, in float32 [, then in c]                    N d       f32, c
      g_product    g_y @ W_out                                                      N f       c
      g_act        gated MLPs: g_product * up                                       N f       c
      g_pre        derivative of act; GPT-2's gelu_new: seven N f alive at most     N f       c
      g_u, g_B     g_pre @ B^T, u^T @ g_pre [, each in float32]                     N r, r f  c, f32
      g_v, g_A     g_u * m, x^T @ g_v [, in float32]                                N r, d r  c, f32
      g_m, g_z     and the gradients of R_F by m, A and B                           N r, r f, d r
      g_A          a^T @ g_z [, in float32]                                         d r       c, f32

In mode `npt` under autograd, attention, gate and up have a graph too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memplan.errors import RunError
from memplan.npt.loss import EquivalenceLoss, mean_square
from memplan.npt.modulator import Modulator


@dataclass
class Controls:
    """What the blocks of one model do in their next forward pass; one object, shared by all of them."""

    num_blocks: int
    form: str
    """`factored` or `materialised`"""
    regularization: float
    mode: str = "npt"
    """`npt`, `base` or `local`"""
    stream: str = "teacher"
    """What a block passes on in `local` mode: the `teacher`'s output or the `student`'s."""
    backward: str = "now"
    """`now` (inside the forward pass), `later` (the caller's, on `local_loss`), or `never` (evaluation)"""
    loss_scale: float | torch.Tensor = 1.0
    measure: bool = False
    """In `npt` mode: whether blocks keep the mean norm of their deltas, with its graph."""
    padding: torch.Tensor | None = None
    """(B, S) bool, True for tokens that do not count; None when all count."""
    num_tokens: torch.Tensor | None = None
    """Scalar: tokens that count; None when all do."""


@dataclass(frozen=True)
class BlockMetrics:
    """Scalars of one block's last local forward pass; they hold no graph and no other storage."""

    loss: torch.Tensor
    target_mean_square: torch.Tensor
    delta_norm: torch.Tensor


class NptBlock(nn.Module):
    """
    What conversion puts before a block's own class. `convert` sets the attributes; there is no constructor.

    A family says in three methods where its attention, its second norm and its MLP are. They call
    modules, never use their weights, so that biases, Conv1D layout, 4-bit weights and adapters keep working.
    """

    np: Modulator
    npt_layer: int
    npt_controls: Controls
    npt_metrics: BlockMetrics | None
    npt_loss: torch.Tensor | None
    npt_norm: torch.Tensor | None

    @property
    def gradient_checkpointing(self) -> bool:
        """Off in `local` mode: recomputing the block would run its backward pass twice."""
        return self.__dict__.get("gradient_checkpointing", False) and self.npt_controls.mode != "local"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.__dict__["gradient_checkpointing"] = value

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Residual stream (B, S, d) to residual stream; other arguments are those of the original block."""
        mode = self.npt_controls.mode
        if mode == "base":
            return super().forward(hidden_states, *args, **kwargs)
        if mode == "local":
            return self._forward_local(hidden_states, *args, **kwargs)
        a = self._attention(hidden_states, *args, **kwargs)
        x = self._mlp_norm(hidden_states)
        codes = self._encode(a)
        self.npt_norm = self._mean_norm(codes) if self.npt_controls.measure else None
        return hidden_states + self._student_mlp(x, codes)

    def _last(self, layer: nn.Module, x: torch.Tensor, codes: list[torch.Tensor]) -> torch.Tensor:
        """The MLP's last matrix, with its delta where it has one, of (B, S, f)."""
        return layer(x) if self.np.down is None else self._modulated(layer, x, self.np.down, codes[-1])

    def _encode(self, a: torch.Tensor) -> list[torch.Tensor]:
        """The codes (B, S, R) of attention outputs (B, S, d), one for each modulated matrix."""
        return [modulator.encode(a) for modulator in self._modulators]

    @property
    def _modulators(self) -> list[Modulator]:
        return [made for made in (self.np, self.np.up, self.np.down) if made is not None]

    def _modulated(
        self, layer: nn.Module, x: torch.Tensor, modulator: Modulator, code: torch.Tensor
    ) -> torch.Tensor:
        """layer(x) + delta(x, a), (B, S, f)."""
        out = layer(x)
        if self.npt_controls.form == "materialised":
            delta_weight = modulator.weight_delta(code, out.dtype)
            delta = (x.to(out.dtype).unsqueeze(-2) @ delta_weight).squeeze(-2)
            delta_bias = modulator.bias_delta(code, out.dtype)
            return out + delta if delta_bias is None else out + delta + delta_bias
        u = modulator.low_rank(x, code).to(out.dtype)
        B = modulator.B.to(out.dtype)
        return torch.addmm(out.flatten(0, -2), u.flatten(0, -2), B).view_as(out)

    @torch.no_grad()
    def _teacher(
        self, h: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        The original block: its attention output, LN2(h), what the NPT branch should equal, and in the teacher
        stream the block's output; (B, S, d) each.

        The target is a + MLP(LN2(h + a)), not out - h: that difference of large numbers is noise in 16 bits.
        """
        a = self._attention(h, *args, **kwargs)
        residual = h + a
        branch = self.mlp(self._mlp_norm(residual))
        target = a + branch
        out = residual + branch if self.npt_controls.stream == "teacher" else None
        x = self._mlp_norm(h)
        return a, x, target, out

    def _forward_local(self, h: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        controls = self.npt_controls
        padding, num_tokens = controls.padding, controls.num_tokens
        if padding is not None and padding.shape != h.shape[:2]:
            raise RunError(
                f"token_mask has shape {tuple(padding.shape)}, but the batch has {tuple(h.shape[:2])}",
                hint="set the mask of every batch with set_mode before its forward pass",
            )
        if num_tokens is None:
            num_tokens = h.shape[0] * h.shape[1]
        num_elements = num_tokens * h.shape[-1]

        a, x, target, out = self._teacher(h, *args, **kwargs)
        with torch.set_grad_enabled(controls.backward != "never"):
            codes = self._encode(a)
            delta_norm = self._mean_norm(codes)
            y = self._student_mlp(x, codes)
            if padding is not None:
                target.masked_fill_(padding.unsqueeze(-1), 0.0)
            equivalence = EquivalenceLoss.apply(y, target, padding, num_elements)
            target_mean_square = mean_square(target, num_elements)
            if out is None:
                out = h.detach() + y.detach()
            del a, x, y, target
            loss = equivalence + controls.regularization * delta_norm
            scaled_loss = loss * (controls.loss_scale / controls.num_blocks)
        self.npt_metrics = BlockMetrics(equivalence.detach(), target_mean_square, delta_norm.detach())
        self.npt_loss = loss if controls.backward == "later" else None
        if controls.backward == "now" and self.np.A.requires_grad:
            with _without_autocast(h.device.type):
                scaled_loss.backward()
        return out

    def _mean_norm(self, codes: list[torch.Tensor]) -> torch.Tensor:
        """Mean over the tokens that count of the squared Frobenius norms of their weight deltas, a scalar."""
        token_norms = self._squared_norms(codes)
        padding, num_tokens = self.npt_controls.padding, self.npt_controls.num_tokens
        if padding is not None:
            token_norms = token_norms.masked_fill(padding, 0.0)
        return token_norms.sum() / (token_norms.numel() if num_tokens is None else num_tokens)

    def _squared_norms(self, codes: list[torch.Tensor]) -> torch.Tensor:
        """Squared Frobenius norms of every token's weight deltas, (B, S)."""
        norms = [modulator.squared_norm(code) for modulator, code in zip(self._modulators, codes)]
        total = norms[0]
        for norm in norms[1:]:
            total = total + norm
        return total

    def _attention(self, h: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attn(LN1(h)), (B, S, d), from the arguments of the block's forward."""
        raise NotImplementedError

    def _mlp_norm(self, h: torch.Tensor) -> torch.Tensor:
        """LN2, (B, S, d)."""
        raise NotImplementedError

    def _student_mlp(self, x: torch.Tensor, codes: list[torch.Tensor]) -> torch.Tensor:
        """MLP'(x, a), (B, S, d), of LN2(h) (B, S, d) and the codes of a."""
        raise NotImplementedError


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast is for forward passes: it would widen what backward computes in 16 bits. Meta has none."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


class GatedBlock(NptBlock):
    """Blocks of Llama, Mistral, Qwen2 and Qwen3: MLP(x) = down_proj(act_fn(gate_proj(x)) * up_proj(x))."""

    def _attention(self, h: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.self_attn(hidden_states=self.input_layernorm(h), **kwargs)[0]

    def _mlp_norm(self, h: torch.Tensor) -> torch.Tensor:
        return self.post_attention_layernorm(h)

    def _student_mlp(self, x: torch.Tensor, codes: list[torch.Tensor]) -> torch.Tensor:
        mlp = self.mlp
        pre = self._modulated(mlp.gate_proj, x, self.np, codes[0])
        # No name for the two factors: autograd keeps the one that it needs.
        return self._last(mlp.down_proj, mlp.act_fn(pre) * self._up(x, codes), codes)

    def _up(self, x: torch.Tensor, codes: list[torch.Tensor]) -> torch.Tensor:
        if self.np.up is None:
            return self.mlp.up_proj(x)
        return self._modulated(self.mlp.up_proj, x, self.np.up, codes[1])


class Gpt2Block(NptBlock):
    """Blocks of GPT-2: MLP(x) = dropout(c_proj(act(c_fc(x)))), with biases."""

    def _attention(
        self,
        h: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        normed = self.ln_1(h)
        return self.attn(normed, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)[0]

    def _mlp_norm(self, h: torch.Tensor) -> torch.Tensor:
        return self.ln_2(h)

    def _student_mlp(self, x: torch.Tensor, codes: list[torch.Tensor]) -> torch.Tensor:
        pre = self._modulated(self.mlp.c_fc, x, self.np, codes[0])
        return self.mlp.dropout(self._last(self.mlp.c_proj, self.mlp.act(pre), codes))
