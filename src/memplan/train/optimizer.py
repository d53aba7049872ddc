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

    torch's Adafactor has no fused step and takes the foreach one instead. `lion` and the 8-bit and paged
    optimizers are those of bitsandbytes, which has one implementation each; `launch` has checked that it is
    there.
    """
    train = job.train
    common: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    kernel = {"foreach": job.optimizer_kernel == "foreach", "fused": job.optimizer_kernel == "fused"}
    match job.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, **common, **kernel)
        case "sgd":
            return torch.optim.SGD(parameters, **common, **kernel)
        case "adafactor":
            return torch.optim.Adafactor(parameters, **common, foreach=job.optimizer_kernel != "loop")
    import bitsandbytes

    classes = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
        "lion": bitsandbytes.optim.Lion,
    }
    return classes[job.optimizer](parameters, **common)


def learning_rate(train: Train, step: int) -> float:
    """
    Learning rate of an optimizer step (from 1): linear warm-up, then constant, or falling to 0 just after the
    last step.

    >>> train = Train(learning_rate=1.0, warmup_steps=2, max_steps=6, schedule="linear")
    >>> [learning_rate(train, step) for step in (1, 2, 3, 6)]
    [0.5, 1.0, 1.0, 0.25]
    """
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    progress = (step - train.warmup_steps - 1) / max(1, train.max_steps - train.warmup_steps)
    if train.schedule == "linear":
        return train.learning_rate * (1 - progress)
    if train.schedule == "cosine":
        return train.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    return train.learning_rate
