"""
A Llama of torchtitan's kind on meta tensors: the operations of its model code, in their order, for `benchmarks.titan`.

What changed from commit to commit is a field of `Titan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Titan:
    """One run: the model, and how it was trained."""

    world_size: int
    micro_batch: int
    length: int
    vocab: int
    kv_heads: int
    hidden: int
    """Of the feed-forward layers."""
    dim: int = 4096
    heads: int = 32
    layers: int = 32
    table_rows: int = 0
    """Positions that the rotary table holds; 0: as many as the sequence is long."""
    fused_norm: bool = False
    """nn.RMSNorm in place of one that is written out in float32."""
    folds: bool = False
    """Batch and sequence are one dimension between the blocks."""
    float_output: bool = False
    """The model returns float32 logits; else the loss makes them."""
    holds_output: bool = False
    """The loop keeps the logits until the next step has others; else it drops them before backward."""
    kernel: str = "FLASH_ATTENTION"
    """The one that scaled_dot_product_attention ran, as SDPBackend names it."""
    checkpointing: str = "selective"
    """`selective` by operation, `full`, or `none`."""
    reshard: str = "default"
    """`fsdp_reshard_after_forward`: `default`, `always` or `never`."""
    more_units: bool = False
    """The embeddings are a unit of sharding of their own, and so are the last norm and the head."""
    optimizer_kernel: str = "foreach"
    reduces_apart: bool = False
    """torch before 2.5: what is reduced is allocated on the stream that reduces it (`benchmarks.titan_step`)."""
    expandable_segments: bool = True
    gpu: str = "H100"


class Norm(nn.Module):
    """In float32, then in the dtype of the input times the weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden: Tensor) -> Tensor:
        out = _scaled(hidden.float()).type_as(hidden)
        return out * self.weight


def _scaled(wide: Tensor) -> Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)


def _norm(run: Titan) -> nn.Module:
    return nn.RMSNorm(run.dim, eps=1e-5) if run.fused_norm else Norm(run.dim)


def _pairs(heads: Tensor) -> Tensor:
    """Neighbours as complex numbers of float32."""
    return torch.view_as_complex(heads.float().reshape(*heads.shape[:-1], -1, 2))


def _rotated(query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Both are rotated before either returns to its dtype."""
    queries, keys = _pairs(query), _pairs(key)
    angles = table[: query.shape[1]].view(1, query.shape[1], 1, queries.shape[-1])
    rotated_query = torch.view_as_real(queries * angles).flatten(3)
    rotated_key = torch.view_as_real(keys * angles).flatten(3)
    return rotated_query.type_as(query), rotated_key.type_as(key)


def _repeated(heads: Tensor, times: int) -> Tensor:
    """A key head for each of its query heads, copied."""
    if times == 1:
        return heads
    batch, length, count, size = heads.shape
    return heads.unsqueeze(3).expand(batch, length, count, times, size).reshape(batch, length, -1, size)


class Attention(nn.Module):
    """Locals live as long as in the original: until a name is given to something else, or the call ends."""

    def __init__(self, run: Titan) -> None:
        super().__init__()
        self.size, self.length = run.dim // run.heads, run.length
        self.times = run.heads // run.kv_heads
        self.kernel = getattr(SDPBackend, run.kernel)
        linear = partial(nn.Linear, bias=False)
        self.wq = linear(run.dim, run.dim)
        self.wk = linear(run.dim, run.kv_heads * self.size)
        self.wv = linear(run.dim, run.kv_heads * self.size)
        self.wo = linear(run.dim, run.dim)

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        query, key, value = self.wq(hidden), self.wk(hidden), self.wv(hidden)
        query, key, value = self._in_heads(query), self._in_heads(key), self._in_heads(value)
        query, key = _rotated(query, key, table)
        keys = _repeated(key, self.times)
        values = _repeated(value, self.times)
        query, key, value = query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        with sdpa_kernel(self.kernel):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out = out.transpose(1, 2).contiguous()
        projected: Tensor = self.wo(out.view(hidden.shape))
        return projected

    def _in_heads(self, projected: Tensor) -> Tensor:
        return projected.view(-1, self.length, projected.shape[-1] // self.size, self.size)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, run: Titan) -> None:
        super().__init__()
        self.w1 = nn.Linear(run.dim, run.hidden, bias=False)
        self.w2 = nn.Linear(run.hidden, run.dim, bias=False)
        self.w3 = nn.Linear(run.dim, run.hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(hidden)) * self.w3(hidden))
        return out


class Block(nn.Module):
    """One layer."""

    def __init__(self, run: Titan) -> None:
        super().__init__()
        self.attention = Attention(run)
        self.feed_forward = FeedForward(run)
        self.attention_norm, self.ffn_norm = _norm(run), _norm(run)

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        middle = hidden + self.attention(self.attention_norm(hidden), table)
        out: Tensor = middle + self.feed_forward(self.ffn_norm(middle))
        return out


class Model(nn.Module):
    """From token ids, (batch, length) int64, to logits, (batch, length, vocabulary)."""

    def __init__(self, run: Titan) -> None:
        super().__init__()
        self.run = run
        self.tok_embeddings = nn.Embedding(run.vocab, run.dim)
        rows = run.table_rows or run.length
        self.register_buffer("table", torch.empty(rows, run.dim // run.heads // 2, dtype=torch.complex64))
        self.layers = nn.ModuleList(Block(run) for _ in range(run.layers))
        self.norm = _norm(run)
        self.output = nn.Linear(run.dim, run.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tok_embeddings(tokens)
        if self.run.folds:
            hidden = hidden.view(-1, self.run.dim)
        for layer in self.layers:
            hidden = layer(hidden, self.table)
        hidden = self.norm(hidden)
        if self.run.folds:
            hidden = hidden.view(*tokens.shape, self.run.dim)
        logits: Tensor = self.output(hidden)
        return logits.float() if self.run.float_output else logits
