"""
Optimizer offload: what trains has a copy in host memory, and the optimizer's states are those of the copies.

A step takes the gradients to the host, steps there, and brings the new weights back. The copies have the dtype of what
they are copies of, so that a step computes what it would on the device. On the CPU there is one memory: the optimizer
steps the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memplan.job.spec import Job


def pinned(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised host memory that a GPU copies from and to."""
    return torch.empty(num_elements, dtype=dtype, pin_memory=True)


class HostCopies:
    """
    Copies of trained parameters, and room for their gradients, in host memory: one buffer of each per dtype, in which
    they stand one behind the other.

    Args:
        trainable: the parameters on the device, whole.
        allocate: makes a buffer of so many elements.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        allocate: Callable[[int, torch.dtype], Tensor] = pinned,
    ) -> None:
        self._trainable = dict(trainable)
        made: dict[str, nn.Parameter] = {}
        self._gradients: dict[str, Tensor] = {}
        for dtype in dict.fromkeys(parameter.dtype for parameter in trainable.values()):
            named = {name: each for name, each in trainable.items() if each.dtype == dtype}
            sizes = [parameter.numel() for parameter in named.values()]
            weights, gradients = (allocate(sum(sizes), dtype).split(sizes) for _ in range(2))
            for (name, parameter), weight, gradient in zip(named.items(), weights, gradients):
                made[name] = nn.Parameter(weight.view(parameter.shape))
                self._gradients[name] = gradient.view(parameter.shape)
        self.parameters = {name: made[name] for name in trainable}
        """By the names, and in the order, of `trainable`: what the optimizer is made for."""
        with torch.no_grad():
            for name, copy in self.parameters.items():
                copy.copy_(self._trainable[name])

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on a step of `optimizer`, made for `parameters`, is one of the weights on the device."""

        def before(*_: Any) -> None:
            self._take_gradients()

        def after(*_: Any) -> None:
            self.bring_weights()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def _take_gradients(self) -> None:
        """Gradients to the host; those on the device are let go."""
        devices = set()
        for name, parameter in self._trainable.items():
            copy, room = self.parameters[name], self._gradients[name]
            copy.grad = None
            if parameter.grad is not None:
                copy.grad = room.copy_(parameter.grad, non_blocking=True)
                devices.add(parameter.device)
                parameter.grad = None
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    @torch.no_grad()
    def bring_weights(self) -> None:
        """Weights to the device: after a step, and when a checkpoint was read into the copies."""
        for name, parameter in self._trainable.items():
            # The host waits for the stream before it writes to the copies again: see _take_gradients.
            parameter.copy_(self.parameters[name], non_blocking=True)


def host_copies(job: Job, trainable: Mapping[str, nn.Parameter], device: torch.device) -> HostCopies | None:
    """
    Copies for the optimizer to step, if the job keeps its states on the host; None where it steps what trains itself,
    FSDP's offloaded shards and everything on the CPU among it.
    """
    if not job.offload.optimizer or job.offload.params or device.type != "cuda":
        return None
    return HostCopies(trainable)
