"""
Models and optimizers of the user's, made meta for a while: their objects stay, their storages are put aside.

A parameter keeps its identity, so that whatever refers to it (the optimizer, a closure, another module) sees the
stand-in, and afterwards the values it had.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memplan.errors import TraceError

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class StandIns:
    """
    Meta tensors for real ones; those that share a storage still do.

    Args:
        keeps_meta: tensors that are meta already stay, and so whatever sharding and DDP know of them; only their
            gradients are put aside.
    """

    def __init__(self, *, keeps_meta: bool = False) -> None:
        self.keeps_meta = keeps_meta
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self.swapped: list[tuple[Tensor, Tensor]] = []
        """Tensors that are meta now, and those that hold what they were."""

    def of(self, tensor: Tensor) -> Tensor:
        """A meta tensor of the same shape, strides and dtype."""
        if tensor.device.type == "meta":
            return tensor.detach()
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = torch.UntypedStorage(storage.nbytes(), device="meta")
        empty = torch.empty(0, dtype=tensor.dtype, device="meta")
        return empty.set_(self._storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())

    def swap(self, tensor: Tensor, name: str) -> None:
        """Put aside what a tensor holds, and its gradient."""
        if self.keeps_meta and tensor.device.type == "meta":
            self._gradients.append((tensor, tensor.grad if tensor.is_leaf else None))
            return
        if hasattr(tensor, "device_mesh"):
            raise TraceError(
                f"`{name}` is sharded over ranks that are there",
                hint="build the model on the meta device and shard it within `memplan.fake_process_group(world_size)`, "
                "and trace its step there",
            )
        other = self.of(tensor.detach()).requires_grad_(tensor.requires_grad)
        if tensor.is_leaf and tensor.grad is not None:
            other.grad = self.of(tensor.grad)
        _exchange(tensor, other, name)
        self.swapped.append((tensor, other))

    def undo(self) -> None:
        """Every tensor holds again what it held."""
        for tensor, other in self.swapped:
            _exchange(tensor, other, "a parameter")
            if hasattr(tensor, "_shadow"):
                del tensor._shadow
        for tensor, gradient in self._gradients:
            if tensor.is_leaf:
                tensor.grad = gradient


def _exchange(tensor: Tensor, other: Tensor, name: str) -> None:
    """
    Two Python objects exchange the tensors behind them. `torch.utils.swap_tensors` would exchange attributes too, and
    refuses where a graph still refers to a parameter, as one does whose loss somebody keeps.
    """
    try:
        torch._C._swap_tensor_impl(tensor, other)
    except RuntimeError as error:
        raise TraceError(
            f"`{name}` cannot be put aside: something holds a weak reference to it",
            hint="build the model under `torch.device('meta')`",
        ) from error
    for hooks in _HOOKS:
        found = getattr(tensor, hooks, None)
        if found:
            setattr(tensor, hooks, found)  # the tensor behind has to be told


@contextmanager
def on_meta(
    models: dict[str, nn.Module], optimizers: Iterable[torch.optim.Optimizer], *, keeps_meta: bool = False
) -> Iterator[StandIns]:
    """Within, the parameters, buffers, gradients and optimizer states are meta tensors; arguments as `StandIns`."""
    stand_ins = StandIns(keeps_meta=keeps_meta)
    seen: set[int] = set()
    held: list[tuple[torch.optim.Optimizer, Any, list[dict[str, Any]]]] = []
    try:
        with torch.no_grad():
            for prefix, model in models.items():
                tensors = [*model.named_parameters(), *model.named_buffers(), *quant_constants(model)]
                for name, tensor in tensors:
                    if id(tensor) not in seen:
                        seen.add(id(tensor))
                        stand_ins.swap(tensor, f"{prefix}{name}")
            for optimizer in optimizers:
                held.append((optimizer, optimizer.state, [dict(group) for group in optimizer.param_groups]))
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        if id(parameter) not in seen:
                            seen.add(id(parameter))
                            stand_ins.swap(parameter, "a parameter of the optimizer")
                optimizer.state = defaultdict(dict)
                for parameter, state in held[-1][1].items():
                    optimizer.state[parameter] = {
                        key: stand_ins.of(value) if _is_on_device(value) else value
                        for key, value in state.items()
                    }
        yield stand_ins
    finally:
        with torch.no_grad():
            stand_ins.undo()
        for optimizer, state, groups in held:
            optimizer.state = state
            for group, before in zip(optimizer.param_groups, groups):
                group.clear()
                group.update(before)


def quant_constants(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What bitsandbytes keeps beside packed weights, which is neither a parameter nor a buffer, by name."""
    for path, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None) or getattr(
            module, "quant_state", None
        )
        for owner in (getattr(module, "weight", None), getattr(module, "state", None)):  # of 8 bits
            for key in ("CB", "SCB"):
                tensor = getattr(owner, key, None)
                if isinstance(tensor, Tensor):
                    yield f"{path}.weight {key}", tensor
        depth = ""
        while state is not None:
            for key in ("absmax", "code", "offset"):
                tensor = getattr(state, key, None)
                if isinstance(tensor, Tensor):
                    yield f"{path}.weight {depth}{key}", tensor
            state, depth = getattr(state, "state2", None), f"{depth}nested "


def _is_on_device(value: Any) -> bool:
    """Steps of optimizers that are not fused are kept on the CPU, wherever the parameter is."""
    return isinstance(value, Tensor) and not (value.dim() == 0 and value.device.type == "cpu")
