"""The job's optimizer and its learning rate, which is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from memplan.job.spec import Job, Train


def build_optimizer(job: Job, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """
    The optimizer that `job.optimizer` names, with the step implementation that `job.optimizer_kernel` names.

    torch's Adafactor has no fused step: it goes through the parameters one by one instead, which takes least memory.
    `lion` and the 8-bit and paged
    optimizers are those of bitsandbytes, which has one implementation each; `launch` has checked that it is
    there.
    """
    train = job.train
    groups = parameter_groups(parameters, train.weight_decay)
    common: dict[str, Any] = {"lr": train.learning_rate}
    betas = {"betas": (train.beta1, train.beta2)}
    kernel = {"foreach": job.optimizer_kernel == "foreach", "fused": job.optimizer_kernel == "fused"}
    match job.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, **common, **betas, **kernel, eps=train.epsilon)
        case "sgd":
            return torch.optim.SGD(groups, **common, **kernel)
        case "adafactor":
            return torch.optim.Adafactor(groups, **common, foreach=job.optimizer_kernel == "foreach")
    import bitsandbytes

    if job.optimizer == "lion":
        return bitsandbytes.optim.Lion(groups, **common, **betas)
    classes = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return classes[job.optimizer](groups, **common, **betas, eps=train.epsilon)


def parameter_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """
    One group; with weight decay two: matrices first, then what has one dimension, which is not decayed.

    The planner groups as this does (tape/optimizer.py): a foreach step takes its temporaries per group.
    """
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    if not weight_decay or not matrices or not vectors:
        return [{"params": list(parameters), "weight_decay": weight_decay if matrices else 0.0}]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def learning_rate(train: Train, step: int) -> float:
    """
    Learning rate of an optimizer step (from 1): linear warm-up, then constant, or falling to
    `min_learning_rate` just after the last step.

    >>> train = Train(learning_rate=1.0, warmup_steps=2, max_steps=6, schedule="linear")
    >>> [learning_rate(train, step) for step in (1, 2, 3, 6)]
    [0.5, 1.0, 1.0, 0.25]
    """
    warmup = train.num_warmup_steps
    if step <= warmup:
        return train.learning_rate * step / warmup
    progress = (step - warmup - 1) / max(1, train.max_steps - warmup)
    span = train.learning_rate - train.min_learning_rate
    if train.schedule == "linear":
        return train.min_learning_rate + span * (1 - progress)
    if train.schedule == "cosine":
        return train.min_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
    return train.learning_rate
