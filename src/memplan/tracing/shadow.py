"""
Values of small tensors, carried along while everything else is shape only.

transformers looks at values to decide what to run: whether positions restart, whether a mask masks anything. Small
tensors whose content is known therefore have a real copy on the CPU, and operations whose inputs all have one are
evaluated on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

MAX_INTEGERS = 1 << 20
MAX_FLOATS = 1 << 16
"""Larger tensors carry no values: attention masks of full size would take seconds and change no decision."""

_FACTORIES = frozenset({"aten::arange", "aten::zeros", "aten::ones", "aten::full", "aten::scalar_tensor"})


@dataclass(frozen=True)
class HostCopy:
    """What a copy to the host gives; zeros where the values are not known."""

    tensor: Tensor
    is_known: bool


def _is_small(tensor: Tensor) -> bool:
    limit = MAX_FLOATS if tensor.dtype.is_floating_point else MAX_INTEGERS
    return tensor.numel() <= limit and not tensor.dtype.is_complex


class Shadows:
    """Attaches values to meta tensors and evaluates operations on them."""

    def __init__(self, device_type: str = "meta") -> None:
        self.enabled = device_type == "meta"

    def give(self, tensor: Tensor, values: Tensor) -> Tensor:
        """The content of a meta tensor is `values`."""
        tensor._shadow = values
        return tensor

    def attach(self, out: Any, values: Any) -> None:
        """Attach what `evaluate` returned to what the operation returned."""
        if isinstance(out, Tensor):
            if isinstance(values, Tensor) and _is_small(values):
                out._shadow = values
        elif isinstance(out, (list, tuple)):
            for tensor, value in zip(out, values):
                if isinstance(tensor, Tensor) and isinstance(value, Tensor):
                    tensor._shadow = value

    def forget(self, tensor: Any) -> None:
        """Values that are not known were written into a tensor, or into the one that it is a view of."""
        for written in (tensor, getattr(tensor, "_base", None)):
            if written is not None and hasattr(written, "_shadow"):
                del written._shadow

    def evaluate(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's result on known values; None if any input's are unknown."""
        if not self.enabled:
            return None
        found = False
        for arg in args:
            for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
                if not isinstance(tensor, Tensor):
                    continue
                if tensor.device.type == "meta":
                    if not hasattr(tensor, "_shadow"):
                        return None
                    found = True
                elif not _is_small(tensor):
                    return None
        if not found and not _makes_known(name, args, kwargs):
            return None
        host_args = [
            [_value(item) for item in arg] if isinstance(arg, (list, tuple)) else _value(arg) for arg in args
        ]
        host_kwargs = {
            key: torch.device("cpu") if key == "device" and value is not None else _value(value)
            for key, value in kwargs.items()
        }
        try:
            return func(*host_args, **host_kwargs)
        except (RuntimeError, TypeError, NotImplementedError):
            return None  # not on the CPU: the values are then simply not known

    def to_host(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HostCopy | None:
        """What a copy from the device to the CPU gives; None if the operation is no such copy."""
        if not self.enabled:
            return None
        if name == "aten::_to_copy":
            device, source = kwargs.get("device"), args[0]
            if device is None or device.type != "cpu" or source.device.type != "meta":
                return None
            dtype = kwargs.get("dtype") or source.dtype
            values = getattr(source, "_shadow", None)
            if values is None:
                return HostCopy(torch.zeros(source.shape, dtype=dtype), is_known=False)
            return HostCopy(values.to(dtype, copy=True), is_known=True)
        target, source = args[0], args[1]
        if target.device.type != "cpu" or source.device.type != "meta":
            return None
        values = getattr(source, "_shadow", None)
        if values is not None:
            target.copy_(values)
        return HostCopy(target, is_known=values is not None)


def _makes_known(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation without meta inputs makes a small tensor of known values on the device."""
    device = kwargs.get("device")
    if device is None or device.type != "meta":
        return False
    if name == "aten::_to_copy":
        return isinstance(args[0], Tensor) and args[0].device.type == "cpu"
    if name not in _FACTORIES:
        return False
    shape = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return prod(shape) <= MAX_FLOATS


def _value(item: Any) -> Any:
    return item._shadow if isinstance(item, Tensor) and item.device.type == "meta" else item
