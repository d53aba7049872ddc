"""
BERT with a head for classification in transformers' Trainer, as both were in January 2022 with torch 1.10.

The model is that of transformers 4.16 (models/bert/modeling_bert.py), the step that of its trainer.py and
optimization.py. Where torch of that time and today's differ: softmax kept its input for backward as well (before
pytorch#66018, in 1.11; transformers' `is_torch_less_than_1_11` says so), and `zero_grad` filled gradients with zeros
and kept them (`set_to_none` became the default in 2.0). cuBLAS's workspaces were its own, outside of torch's allocator
(`Behaviour.cublas_workspace_bytes`). Attention is written out, as it was before sdpa.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Sizes(NamedTuple):
    """Of bert-large-uncased (its config.json)."""

    hidden: int = 1024
    layers: int = 24
    heads: int = 16
    intermediate: int = 4096
    vocabulary: int = 30522
    positions: int = 512
    types: int = 2
    labels: int = 2
    dropout: float = 0.1


class _Softmax(torch.autograd.Function):
    """Over the last dimension, as torch 1.10 had it: its input lives until backward (derivatives.yaml, _softmax)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        weights = torch._softmax(scores, -1, False)
        ctx.save_for_backward(scores, weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        _, weights = ctx.saved_tensors
        return torch._softmax_backward_data(gradients[0], weights, -1, weights.dtype)


class _Linear(nn.Linear):
    """
    As torch 1.10 had it: of more than two dimensions a product, and a sum in place with the bias, whose gradient then
    comes before those of the product (aten/src/ATen/native/Linear.cpp); today it is one operation, and comes after.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return super().forward(x)
        out = F.linear(x, self.weight)
        return out.add_(self.bias.to(out.dtype))


class _Embeddings(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.vocabulary, sizes.hidden, padding_idx=0)
        self.position_embeddings = nn.Embedding(sizes.positions, sizes.hidden)
        self.token_type_embeddings = nn.Embedding(sizes.types, sizes.hidden)
        self.LayerNorm = nn.LayerNorm(sizes.hidden, eps=1e-12)
        self.dropout = nn.Dropout(sizes.dropout)
        for name in ("position_ids", "token_type_ids"):
            self.register_buffer(name, torch.zeros(1, sizes.positions, dtype=torch.long))

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.get_buffer("position_ids")[:, : ids.shape[1]]
        types = self.get_buffer("token_type_ids")[:, : ids.shape[1]].expand(*ids.shape)
        words = self.word_embeddings(ids)
        embeddings = words + self.token_type_embeddings(types)
        embeddings += self.position_embeddings(positions)
        embeddings = self.LayerNorm(embeddings)
        return self.dropout(embeddings)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.head_dim = sizes.heads, sizes.hidden // sizes.heads
        self.query, self.key, self.value = (_Linear(sizes.hidden, sizes.hidden) for _ in range(3))
        self.dropout = nn.Dropout(sizes.dropout)

    def _by_head(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], self.heads, self.head_dim).permute(0, 2, 1, 3)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        mixed = self.query(hidden)
        key = self._by_head(self.key(hidden))
        value = self._by_head(self.value(hidden))
        query = self._by_head(mixed)
        scores = torch.matmul(query, key.transpose(-1, -2))
        scores = scores / self.head_dim**0.5
        scores = scores + mask
        weights = _Softmax.apply(scores)
        weights = self.dropout(weights)
        context = torch.matmul(weights, value)
        context = context.permute(0, 2, 1, 3).contiguous()
        return context.view(*hidden.shape)


class _Output(nn.Module):
    """Dense, dropout, and the norm of the sum with what went in."""

    def __init__(self, width: int, sizes: Sizes) -> None:
        super().__init__()
        self.dense = _Linear(width, sizes.hidden)
        self.LayerNorm = nn.LayerNorm(sizes.hidden, eps=1e-12)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        hidden = self.dense(hidden)
        hidden = self.dropout(hidden)
        return self.LayerNorm(hidden + residual)  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention = _Attention(sizes)
        self.attention_output = _Output(sizes.hidden, sizes)
        self.intermediate = _Linear(sizes.hidden, sizes.intermediate)
        self.output = _Output(sizes.intermediate, sizes)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        attended = self.attention_output(self.attention(hidden, mask), hidden)
        return self.output(self._activated(attended), attended)  # type: ignore[no-any-return]

    def _activated(self, hidden: Tensor) -> Tensor:
        hidden = self.intermediate(hidden)
        return F.gelu(hidden)


class Bert(nn.Module):
    """BertForSequenceClassification: `forward(ids, labels)`, [batch, length] and [batch], gives the loss."""

    def __init__(self, sizes: Sizes, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embeddings = _Embeddings(sizes)
        self.layer = nn.ModuleList(_Layer(sizes) for _ in range(sizes.layers))
        self.pooler = _Linear(sizes.hidden, sizes.hidden)
        self.dropout = nn.Dropout(sizes.dropout)
        self.classifier = _Linear(sizes.hidden, sizes.labels)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        mask = torch.ones(ids.shape, device=ids.device)[:, None, None, :]
        mask = (1.0 - mask) * -10000.0
        hidden = self.embeddings(ids)
        for layer in self.layer:
            if self.checkpointing:
                hidden = checkpoint(layer, hidden, mask, use_reentrant=True)
            else:
                hidden = layer(hidden, mask)
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        logits = self.classifier(self.dropout(pooled))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


class AdamW(torch.optim.Optimizer):
    """transformers' own (optimization.py), the Trainer's default then: tensor by tensor."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 5e-5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step."""
        for parameter in self.param_groups[0]["params"]:
            gradient, state = parameter.grad, self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["exp_avg"].mul_(0.9).add_(gradient, alpha=0.1)
            state["exp_avg_sq"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            denominator = state["exp_avg_sq"].sqrt().add_(1e-8)
            parameter.addcdiv_(state["exp_avg"], denominator, value=-5e-5)


class Adam8bit(torch.optim.Optimizer):
    """
    bitsandbytes 0.26 (optim/optimizer.py, Optimizer2State): a byte per element for each state, a float32 for each 2048
    elements, and float32 states below 4096 elements. The page's script leaves embeddings as they are; its tip to keep
    theirs in float32 is not in the script.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 5e-5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step, in place but for the states."""
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if state:
                continue
            is_small = parameter.numel() < 4096
            for number in (1, 2):
                dtype = torch.float32 if is_small else torch.uint8
                state[f"state{number}"] = torch.zeros_like(parameter, dtype=dtype)
            for number in () if is_small else (1, 2):
                blocks = -(-parameter.numel() // 2048)
                state[f"absmax{number}"] = torch.zeros(blocks, device=parameter.device)


def _adafactor(model: nn.Module) -> torch.optim.Optimizer:
    """The Trainer's `adafactor`; transformers has not changed its step since."""
    from transformers.optimization import Adafactor

    return Adafactor(model.parameters(), lr=5e-5, scale_parameter=False, relative_step=False)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: AdamW(model.parameters()),
    "adafactor": _adafactor,
    "adam_8bit": lambda model: Adam8bit(model.parameters()),
}


def classifier_step(
    batch: int, optimizer: str = "adamw", accumulation: int = 1, fp16: bool = False, checkpointing: bool = False,
    length: int = 512, sizes: Sizes | None = None,
) -> tuple[Callable[[], None], nn.Module, torch.optim.Optimizer]:  # fmt: skip
    """Trainer.training_step `accumulation` times, clipping and the optimizer's step."""
    with torch.device("meta"):
        model = Bert(sizes or Sizes(), checkpointing)
    model.train()
    chosen = OPTIMIZERS[optimizer](model)

    def training_step() -> None:
        ids = torch.zeros(batch, length, dtype=torch.long, device="cuda")
        labels = torch.zeros(batch, dtype=torch.long, device="cuda")
        with torch.autocast("cuda", dtype=torch.float16, enabled=fp16):
            loss = model(ids, labels)
        if accumulation > 1:
            loss = loss / accumulation
        (loss * 65536.0 if fp16 else loss).backward()

    def step() -> None:
        for _ in range(accumulation):
            training_step()
        gradients = [parameter.grad for parameter in model.parameters()]
        if fp16:
            for gradient in gradients:
                gradient.mul_(1 / 65536.0)
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
        factor = torch.clamp(1.0 / (torch.linalg.vector_norm(norms) + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
        chosen.step()
        model.zero_grad(set_to_none=False)

    return step, model, chosen
