"""
`Recorder`: the allocations and frees of real PyTorch code that runs on meta tensors, in order.

A storage that an operation returns for the first time is an allocation, and its death the free (`storages.py`). C++
sees nothing but the meta device: no driver, no device guard, one thread.

What the meta device does otherwise than CUDA is put right in `cuda.py` (operations), `scratch.py` (memory inside
operations) and here (accumulation of gradients).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.tape.multiprocessors import A100, Multiprocessors
from memplan.tracing.replaced import replaced
from memplan.tracing.scratch import scratch_of
from memplan.tracing.shadow import Shadows
from memplan.tracing.specs import outputs
from memplan.tracing.storages import Storages

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"})
"""Operations that run in cuBLAS, which takes a workspace at a thread's first."""

_GATHERING = frozenset({"aten::stack", "aten::cat"})

Handler = Callable[["Recorder", Any, tuple[Any, ...], dict[str, Any]], Any]
"""Runs in place of an operation; NotImplemented leaves it to torch."""


@dataclass(frozen=True)
class _Operation:
    """What the recorder has to know of an operator, looked up once."""

    name: str
    fresh: bool
    handler: Handler | None
    scratch: Callable[..., list[int]] | None
    is_conversion: bool
    """`to` as a handler calls it; where autograd is, its `_to_copy` arrives in its place."""
    is_product: bool
    is_pure: bool
    """Returns fresh tensors only and changes none."""
    writes: bool
    """Changes its first argument."""


class Recorder(Storages, TorchDispatchMode):
    """
    Records while it is active as a dispatch mode.

    Args:
        device_type: of the tensors that are recorded: `meta`, or `cpu` to follow a real run.
        handlers: operator name to what runs instead of it.
        workspace_bytes: of cuBLAS, per thread; 0 for a CPU.
        bias_workspace_bytes: of cuBLASLt, which runs products with a bias, per thread; 0 where it has none of its own.
        kernel_scratch: count the memory that CUDA kernels take inside operations.
        multiprocessors: those of the card.
    """

    def __init__(
        self,
        *,
        device_type: str = "meta",
        handlers: dict[str, Handler] | None = None,
        workspace_bytes: int = 0,
        bias_workspace_bytes: int = 0,
        kernel_scratch: bool = True,
        multiprocessors: Multiprocessors = A100,
    ) -> None:
        TorchDispatchMode.__init__(self)
        Storages.__init__(self, device_type)
        self.shadows = Shadows(device_type)
        self.handlers = handlers or {}
        self.workspace_bytes = workspace_bytes
        self.bias_workspace_bytes = bias_workspace_bytes
        self.kernel_scratch = kernel_scratch
        self.multiprocessors = multiprocessors
        self.unknown_values = 0
        """How often code asked for a value that meta tensors have not: the answer was 1."""
        self.unknown_outside = 0
        """The same, of code outside all modules."""
        self._operations: dict[Any, _Operation] = {}
        self._workspaces: set[str] = set()

    @contextmanager
    def active(self) -> Iterator[Recorder]:
        """Record, also what no operation is dispatched for: `torch.tensor`, and storages that FSDP resizes in place."""
        original, make = torch.UntypedStorage.resize_, torch.tensor

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            self._resize(storage, int(size))
            return original(storage, size)

        def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
            self._see(made := make(*args, **kwargs), self._locate(()).category, "tensor")
            return made

        changes = [(torch.UntypedStorage, "resize_", resize), (torch, "tensor", tensor)]
        with replaced(changes), self.places.followed(), self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for kind in types:
            if kind.__name__ in ("DTensor", "AsyncCollectiveTensor"):
                return NotImplemented  # the wrapper unwraps; its local operations come back here
            if kind.__name__ == "FakeTensor":
                return func(*args, **kwargs)  # sharding propagation, at global sizes
        if self.host is not None:
            result = self.host.run(func, args, kwargs)
            if result is not NotImplemented:
                return result
        operation = self._operations.get(func) or self._look_up(func)
        place = self._locate(args)
        if operation.handler is not None:
            result = operation.handler(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        if operation.is_conversion:
            with self:
                return func.decompose(*args, **kwargs)
        if self.workspace_bytes and (
            operation.is_product or (self._phase == "backward" and self._workspaces)
        ):
            self._claim_workspace(bias=operation.name == "aten::addmm" and args[0].dim() == 1)
        known = self.shadows.evaluate(operation.name, func, args, kwargs)
        if known is None and operation.writes:
            self.shadows.forget(args[0])
        if operation.name == "aten::_local_scalar_dense" and args[0].device.type == "meta":
            return self._read(args[0], known)
        if operation.name in ("aten::_to_copy", "aten::copy_"):
            host = self.shadows.to_host(operation.name, args, kwargs)
            if host is not None:
                self.unknown_values += not host.is_known
                return host.tensor
        out = outputs(func, args, kwargs) if operation.is_pure else func(*args, **kwargs)
        if operation.fresh:
            arrives = operation.name == "aten::_to_copy" and args[0].device.type != self.device_type
            self._see(out, "inputs" if arrives else place.category, operation.name)
            if operation.name in _GATHERING and self.multiplicity and place.layer is None:
                self._count_all(out, args[0])
        if operation.scratch is not None:
            self.scratch(operation.scratch(*args, **kwargs), operation.name.removeprefix("aten::"))
        if known is not None:
            self.shadows.attach(out, known)
        return out

    def operations_seen(self) -> set[str]:
        """Names of the operations that ran."""
        return {operation.name for operation in self._operations.values()}

    def _look_up(self, func: Any) -> _Operation:
        name = func._schema.name
        operation = self._operations[func] = _Operation(
            name=name,
            fresh=any(result.alias_info is None for result in func._schema.returns),
            handler=self.handlers.get(name),
            scratch=scratch_of(name, self.multiprocessors if self.kernel_scratch else None),
            is_conversion=name == "aten::to",
            is_product=name in PRODUCTS,
            is_pure=self.device_type == "meta" and _is_pure(func._schema),
            writes=func._schema.is_mutable and isinstance(func._schema.arguments[0].type, torch.TensorType),
        )
        return operation

    def _claim_workspace(self, *, bias: bool) -> None:
        # The thread that runs backward has a cuBLAS handle of its own. Its workspace comes with its first product; here
        # it comes as backward begins, so that blocks stay alike.
        thread = "forward" if torch._C._current_autograd_node() is None else "backward"
        self._keep(f"cuBLAS workspace ({thread})", self.workspace_bytes)
        if bias:
            self._keep(f"cuBLASLt workspace ({thread})", self.bias_workspace_bytes)

    def claim_workspaces(self) -> None:
        """Those of both threads, for a process that has used cuBLAS before."""
        for thread in ("backward", "forward"):
            self._keep(f"cuBLAS workspace ({thread})", self.workspace_bytes)
        self._keep("cuBLASLt workspace (forward)", self.bias_workspace_bytes)

    def _keep(self, name: str, num_bytes: int) -> None:
        if num_bytes and name not in self._workspaces:
            self._workspaces.add(name)
            self.persistent(num_bytes, name)

    def _read(self, tensor: torch.Tensor, known: Any) -> Any:
        if known is not None:
            return known
        if self.places.stack:
            self.unknown_values += 1
        else:
            self.unknown_outside += 1  # a loop's own look at its loss, which decides nothing as a rule
        return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1


def _is_pure(schema: Any) -> bool:
    fresh = all(result.alias_info is None and str(result.type) == "Tensor" for result in schema.returns)
    return bool(schema.returns) and fresh and not schema.is_mutable


_TRANSPARENT = (
    "inner",
    "_fn",
    "wrapper",
    "__torch_dispatch__",
    "called_by_engine",
    "accumulate",
    "_in_place",
)


def called_by_engine() -> bool:
    """Whether autograd's engine itself called the operation at hand, not Python code that runs inside backward."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name in _TRANSPARENT:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"
