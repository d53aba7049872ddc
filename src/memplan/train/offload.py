"""
Activation offload: what a checkpointed block keeps for its recomputation, its input, waits in host memory.

Which tensors move is decided here once; how they move is a `Mover`: on CUDA through pinned memory and a stream of its
own, on the CPU by plain copies, which save nothing there and make the whole path run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memplan.errors import RunError

SMALLEST_BYTES = 1024
"""Smaller tensors stay: moving them takes longer than they are worth."""


class Mover(Protocol):
    """Copies tensors to host memory and back, keeping dtype and strides."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory; the original may be let go at once."""

    def to_device(self, host: Tensor) -> Tensor:
        """A copy on the device, that may be read at once."""


class PlainMover:
    """Copies within one memory, for the CPU."""

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    def to_device(self, host: Tensor) -> Tensor:
        return host.clone()


class CudaMover:
    """Pinned host memory; copies to it run beside the forward pass, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is given to others only when the copy is done
        return host

    def to_device(self, host: Tensor) -> Tensor:
        tensor = torch.empty_like(host, device=self.device, pin_memory=False)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return tensor.copy_(host, non_blocking=True)


def make_mover(device: torch.device) -> Mover:
    """The mover for a device."""
    return CudaMover(device) if device.type == "cuda" else PlainMover()


class OffloadedCheckpoint:
    """
    Stands in for the function that a checkpointed block is run with: the same, but what is saved of the block's
    arguments goes to the host.

    The block's own activations are not touched: inside, checkpointing's hooks replace these.
    """

    def __init__(self, checkpoint: Callable[..., Any], mover: Mover) -> None:
        self.checkpoint = checkpoint
        self.mover = mover

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        with saved_tensors_hooks(self._pack, self._unpack):
            return self.checkpoint(function, *args)

    def _pack(self, tensor: Tensor) -> tuple[bool, Tensor]:
        stays = isinstance(tensor, nn.Parameter) or tensor.nbytes < SMALLEST_BYTES
        return (False, tensor) if stays else (True, self.mover.to_host(tensor))

    def _unpack(self, packed: tuple[bool, Tensor]) -> Tensor:
        moved, tensor = packed
        return self.mover.to_device(tensor) if moved else tensor


def offload_inputs(model: nn.Module, mover: Mover) -> None:
    """
    Keep the inputs of a model's checkpointed blocks in host memory; checkpointing is on already.

    Raises:
        RunError: its blocks are not checkpointed the way that transformers does it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    name = "_gradient_checkpointing_func"
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks or not all(hasattr(block, name) for block in blocks):
        raise RunError(
            "the inputs of this model's blocks cannot be offloaded: the installed transformers checkpoints them in "
            "another way",
            hint="use `--set activation_offload=false`",
        )
    for block in blocks:
        setattr(block, name, OffloadedCheckpoint(getattr(block, name), mover))
