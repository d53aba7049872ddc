"""Training steps as people write them, each as (step, model, optimizer, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Made = tuple[Callable[[Any], Any], Any, Any, Any]

WIDTH, LENGTH, CLASSES = 64, 96, 300


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Classifier(nn.Module):
    """Ids to class scores per token; with `recompute` its blocks are checkpointed."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def _ids() -> Tensor:
    return torch.randint(0, CLASSES, (8, LENGTH), generator=torch.Generator().manual_seed(0))


def _loss(scores: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), ids.flatten())


def plain() -> Made:
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def step(batch: Any) -> float:
        loss = _loss(model(batch["ids"]), batch["ids"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, model, optimizer, {"ids": _ids()}


def accumulated() -> Made:
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=False)

    def step(batch: Any) -> Tensor:
        for part in batch.chunk(4):
            scores = model(part)
            (_loss(scores, part) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        return scores

    return step, model, optimizer, _ids()


def recomputed() -> Made:
    model = Classifier(recompute=True)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        _loss(model(batch[0]), batch[0]).backward()
        optimizer.step()

    return step, model, optimizer, [_ids()]


class Squared(torch.autograd.Function):
    """A custom function that saves its input and one tensor more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        doubled = 2 * x
        ctx.save_for_backward(doubled)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


def custom_function() -> Made:
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def step(batch: Any) -> None:
        Squared.apply(model(batch)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model, optimizer, _ids()


def distilled() -> Made:
    teacher, student = Classifier(), Classifier()
    optimizer = torch.optim.AdamW(student.parameters(), foreach=False)

    def step(batch: Any) -> None:
        with torch.no_grad():
            wanted = teacher(batch).softmax(-1)
        F.kl_div(student(batch).log_softmax(-1), wanted, reduction="batchmean").backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, {"teacher": teacher, "student": student}, optimizer, _ids()


def adversarial() -> Made:
    """Two optimizers, and a penalty on gradients, which is differentiated twice."""
    generator = nn.Sequential(nn.Linear(16, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 256))
    critic = nn.Sequential(nn.Linear(256, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    first = torch.optim.Adam(generator.parameters(), foreach=False)
    second = torch.optim.Adam(critic.parameters(), foreach=False)

    def step(batch: Any) -> None:
        real, noise = batch
        fake = generator(noise).detach().requires_grad_()
        scores = critic(fake)
        (slope,) = torch.autograd.grad(scores.sum(), fake, create_graph=True)
        (scores.mean() - critic(real).mean() + slope.pow(2).mean()).backward()
        second.step()
        second.zero_grad()
        (-critic(generator(noise)).mean()).backward()
        first.step()
        first.zero_grad()
        second.zero_grad()

    return step, [generator, critic], [first, second], (torch.randn(512, 256), torch.randn(512, 16))


STEPS = {
    function.__name__: function
    for function in (plain, accumulated, recomputed, custom_function, distilled, adversarial)
}
