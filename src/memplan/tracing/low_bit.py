"""
A stand-in for torchao's optimizers, whose compiled step a trace cannot follow: it makes their states, and of each step
the buffers that are written down in tape/low_bit.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from memplan.job.spec import Job
from memplan.tape.low_bit import LOW_BIT, Buffer, state_buffers, step_buffers
from memplan.tape.multiprocessors import Multiprocessors
from memplan.tracing.replaced import replaced


class LowBitAdamW(torch.optim.Optimizer):
    """
    Args:
        groups: parameters, or groups of them.
        optimizer: as a job names it.
        device: the GPU's multiprocessors.
    """

    def __init__(
        self, groups: Iterable[Any], *, optimizer: str, device: Multiprocessors, lr: float = 1e-3
    ) -> None:
        super().__init__(groups, {"lr": lr})
        self._optimizer, self._device = optimizer, device

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """As `_AdamBase.step` of torchao's optim/adam.py, parameter by parameter."""
        held: dict[str, torch.Tensor] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                shape, dtype = tuple(local.shape), str(local.dtype).removeprefix("torch.")
                state = self.state[parameter]
                if not state:
                    for buffer in state_buffers(self._optimizer, shape, dtype):
                        state[buffer.name] = _empty(buffer, local)
                for item in step_buffers(self._optimizer, shape, self._device):
                    if isinstance(item, Buffer):
                        held[item.name] = _empty(item, local)
                    else:
                        del held[item]


def _empty(buffer: Buffer, local: torch.Tensor) -> torch.Tensor:
    """By a method of the parameter, from which the recorder takes whose it is."""
    return local.new_empty(buffer.shape, dtype=getattr(torch, buffer.dtype))


@contextlib.contextmanager
def torchao_on_meta(job: Job, device: Multiprocessors) -> Iterator[None]:
    """transformers' Trainer takes the stand-in for the optimizer that it would import from torchao."""
    if job.optimizer not in LOW_BIT or job.loop != "hf_trainer":
        yield
        return
    from transformers import Trainer

    def stand_in(args: Any, model: Any = None) -> tuple[type, dict[str, Any]]:
        return LowBitAdamW, {"lr": args.learning_rate, "optimizer": job.optimizer, "device": device}

    with replaced([(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(stand_in))]):
        yield
