"""
Stand-ins for packages whose kernels need a GPU: they allocate what the packages do, and compute nothing.

* flash-attn 2 (flash_attn/flash_attn_interface.py, FlashAttnFunc, FlashAttnVarlenFunc; csrc/flash_attn/flash_api.cpp):
  output and gradients in the order of what they are of, log-sum-exp, the state of the generator.
* liger-kernel 0.8.5 (ops/fused_linear_cross_entropy.py): one buffer for the logits of a chunk where nothing is cast.

They take the packages' place whether or not those are installed, which no meta tensor could run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from memplan.errors import TraceError
from memplan.job.spec import Job
from memplan.tape.scratch import flash_backward
from memplan.tracing.recorder import Recorder

FLASH_ATTENTION = "flash-attn 2"
LIGER = "0.8.5"
"""The version of liger-kernel whose allocations these are."""


@contextmanager
def stand_ins(recorder: Recorder, job: Job) -> Iterator[None]:
    """
    What the job needs of these packages is there.

    Raises:
        TraceError: the job wants a fused loss of a loop that takes the loss of the model.
    """
    with ExitStack() as stack:
        if job.attention == "flash_attention_2":
            stack.enter_context(_flash_attention(recorder))
        if job.loss == "fused" and job.method != "npt":
            if job.loop != "memplan":
                raise TraceError(
                    f"`loss: fused` with `loop: {job.loop}` takes a model that Liger has changed, which is not traced",
                    hint="use `--set loop=memplan`, or `--engine shape`",
                )
            stack.enter_context(_liger())
        yield


# flash-attn


@contextmanager
def _flash_attention(recorder: Recorder) -> Iterator[None]:
    import transformers.modeling_flash_attention_utils as module

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    ) -> Tensor:  # fmt: skip
        out: Tensor = _FlashAttention.apply(recorder, q, k, v, None)
        return out

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out: Tensor = _FlashAttention.apply(recorder, q, k, v, (cu_seqlens_q, cu_seqlens_k))
        return out

    def imports(*_: Any, **__: Any) -> tuple[Any, ...]:
        return flash_attn_func, flash_attn_varlen_func, None, module._pad_input, module._unpad_input

    # What the module has loaded it keeps in globals of its own, which are put back with the rest.
    with ExitStack() as stack:
        stack.callback(vars(module).update, dict(vars(module)))
        stack.enter_context(patch.multiple(module, _lazy_imports=imports, _loaded_implementation=None))
        module.lazy_import_flash_attention("flash_attention_2")  # as transformers does when it loads a model
        for name, family in list(sys.modules.items()):
            # Of some families (Falcon, GPT-J) the module takes the function only where flash-attn is installed.
            if name.startswith("transformers.models.") and "is_flash_attn_available" in vars(family):
                forward = module._flash_attention_forward
                stack.enter_context(patch.object(family, "_flash_attention_forward", forward, create=True))
        yield


class _FlashAttention(Function):
    """(B, S, H, D), or (S of all documents, H, D) with where each document begins."""

    @staticmethod
    def forward(
        ctx: Any, recorder: Recorder, q: Tensor, k: Tensor, v: Tensor, starts: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        head_dim = q.shape[-1]
        if head_dim % 8:
            q, k, v = (F.pad(tensor, (0, 8 - head_dim % 8)) for tensor in (q, k, v))
        *outer, heads, _ = q.shape
        out = torch.empty_like(q)
        shape = (heads, *outer) if starts is not None else (outer[0], heads, outer[1])
        log_sum_exp = torch.empty(shape, dtype=torch.float32, device=q.device)
        rng_state = torch.empty((2,), dtype=torch.int64, device=q.device)
        ctx.recorder, ctx.head_dim, ctx.num_documents = recorder, head_dim, None
        documents = starts or ()
        if starts is not None:
            ctx.num_documents = starts[0].numel() - 1
        ctx.save_for_backward(q, k, v, out, log_sum_exp, rng_state, *documents)
        return out[..., :head_dim]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_others = ctx.saved_tensors  # as the package does, which holds all of them until it is done
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        gradient = gradients[0]
        if ctx.head_dim % 8:
            gradient = F.pad(gradient, (0, 8 - ctx.head_dim % 8))
        if ctx.recorder.kernel_scratch:
            ctx.recorder.scratch(_backward_scratch(q, k, ctx.num_documents), "flash attention backward")
        cut = slice(0, ctx.head_dim)
        return None, d_q[..., cut], d_k[..., cut], d_v[..., cut], None


def _backward_scratch(q: Tensor, k: Tensor, num_documents: int | None) -> list[int]:
    """
    As torch's kernel. Of documents in one row: 128 rows more for each, all in one (mha_varlen_bwd: `total_q + 128 *
    batch_size`).
    """
    *outer, heads, head_dim = q.shape
    batch, length = (1, outer[0] + 128 * num_documents) if num_documents is not None else outer
    key_length = k.shape[-3]
    return flash_backward(batch, heads, k.shape[-2], length, key_length, head_dim, q.element_size())


# liger-kernel


def _liger() -> Any:
    functional = ModuleType("liger_kernel.transformers.functional")

    def liger_fused_linear_cross_entropy(
        input: Tensor, weight: Tensor, target: Tensor, *, softcap: float | None = None, **_: Any
    ) -> Tensor:
        loss: Tensor = _FusedLoss.apply(input, weight, target)
        return loss

    functional.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy  # type: ignore[attr-defined]
    modules = {
        "liger_kernel": ModuleType("liger_kernel"),
        "liger_kernel.transformers": ModuleType("liger_kernel.transformers"),
        "liger_kernel.transformers.functional": functional,
    }
    return patch.dict(sys.modules, modules)


class _FusedLoss(Function):
    """Head and loss of (N, d) hidden states in chunks; their gradients are made in forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        num_tokens, width = hidden.shape
        chunk_tokens = min(_power_of_two(-(-num_tokens // -(-weight.shape[0] // width))), num_tokens)
        grad_hidden = torch.zeros_like(hidden)
        trains = hidden.requires_grad and weight.requires_grad
        grad_weight = torch.zeros_like(weight) if trains else None
        losses = torch.zeros(num_tokens, dtype=torch.float32, device=hidden.device)
        counted = target != -100
        counted.sum()
        buffer = None
        if hidden.dtype == weight.dtype and not torch.is_autocast_enabled("cuda"):
            buffer = torch.empty((chunk_tokens, weight.shape[0]), dtype=hidden.dtype, device=hidden.device)
        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, num_tokens))
            part = hidden[rows]
            if buffer is None:
                logits = part @ weight.t()
                grad_hidden[rows] = logits @ weight
            else:
                logits = buffer[: part.shape[0]]
                torch.mm(part, weight.t(), out=logits)
                torch.mm(logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, logits, part)
            del logits
        del buffer
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        torch.ones(
            (), device=gradients[0].device
        )  # compared with the gradient: if they differ, it scales in place
        return (*ctx.saved_tensors, None)


def _add_product(grad_weight: Tensor, logits: Tensor, part: Tensor) -> None:
    """In place by addmm where the logits have 16 bits; else through a product of the size of the head."""
    if logits.dtype in (torch.float16, torch.bfloat16) and grad_weight.dtype in (logits.dtype, torch.float32):
        part = part.to(logits.dtype)
    else:
        grad_weight += torch.mm(logits.t(), part).float()


def _power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
