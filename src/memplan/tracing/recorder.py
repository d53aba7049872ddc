"""
`Recorder`: the allocations and frees of real PyTorch code that runs on meta tensors, in order.

A storage that an operation returns for the first time is an allocation; a weak reference to it fires when the C++
storage dies, which is the free. Views and in-place results share storages, so nothing is counted twice. C++ only sees
the meta device: no driver, no device guard, one thread.

What the meta device does otherwise than CUDA is put right in `cuda.py` (operations), `scratch.py` (memory inside
operations) and here (accumulation of gradients).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.tracing.host import HostMemory
from memplan.tracing.places import Place, Places
from memplan.tracing.replaced import replaced
from memplan.tracing.scratch import SCRATCH
from memplan.tracing.shadow import Shadows
from memplan.tracing.specs import outputs

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"})
"""Operations that run in cuBLAS, which takes a workspace at a thread's first."""

_BY_ARGUMENT = frozenset({"load", "optimizer_step"})
"""Phases in which events belong to the block of the tensors that an operation is given."""

_GATHERING = frozenset({"aten::stack", "aten::cat"})

_OUTSIDE_MODULES = {"forward": "loss", "backward": "loss", "optimizer_step": "optimizer"}
"""What code outside all modules does, by phase."""

Handler = Callable[["Recorder", Any, tuple[Any, ...], dict[str, Any]], Any]
"""Runs in place of an operation; NotImplemented leaves it to torch."""


@dataclass(frozen=True)
class _Operation:
    """What the recorder has to know of an operator, looked up once."""

    name: str
    fresh: bool
    handler: Handler | None
    scratch: Callable[..., list[int]] | None
    is_product: bool
    is_pure: bool
    """Returns fresh tensors only and changes none."""
    writes: bool
    """Changes its first argument."""


class Recorder(TorchDispatchMode):
    """
    Records while it is active as a dispatch mode. Its `events`, `sizes`, `info`, `streams` and `stretches` have the
    form that memplan.tape.repeat.Expansion reads.

    Args:
        device_type: of the tensors that are recorded: `meta`, or `cpu` to follow a real run.
        handlers: operator name to what runs instead of it.
        workspace_bytes: of cuBLAS, per thread; 0 for a CPU.
        kernel_scratch: count the memory that CUDA kernels take inside operations.
    """

    def __init__(
        self,
        *,
        device_type: str = "meta",
        handlers: dict[str, Handler] | None = None,
        workspace_bytes: int = 0,
        kernel_scratch: bool = True,
    ) -> None:
        super().__init__()
        self.events: list[int] = []
        self.sizes: list[int] = [0]
        self.info: list[tuple[str, str, str, str | None, tuple[int, ...] | None]] = [("", "", "", None, None)]
        self.streams: dict[int, int] = {}
        self.stretches: list[tuple[int, str, int | None]] = [(0, "load", None)]
        self.marks: list[tuple[int, str, int]] = []
        self.shadows = Shadows(device_type)
        self.places = Places()
        self.device_type = device_type
        self.handlers = handlers or {}
        self.workspace_bytes = workspace_bytes
        self.kernel_scratch = kernel_scratch
        self.stream: Callable[[], int] = lambda: 0
        self.multiplicity: dict[int, int] = {}
        """How many blocks of the whole model a traced block stands for, where that is not one."""
        self.host: HostMemory | None = None
        """Where offloaded tensors are, if the job offloads any."""
        self.unknown_values = 0
        """How often code asked for a value that meta tensors have not: the answer was 1."""
        self.unknown_outside = 0
        """The same, of code outside all modules."""
        self._operations: dict[Any, _Operation] = {}
        self._live: dict[int, int] = {}
        self._emptied: dict[int, int] = {}
        """By storage that was resized to nothing, what it was."""
        self._references: dict[int, weakref.ref[Any]] = {}
        self._owner: dict[int, tuple[int | None, int]] = {}
        """By storage: its block and its group of stretches."""
        self._workspaces: set[str] = set()
        self._phase = "load"
        self._layer: int | None = None
        self._visited: set[int] = set()
        self._previous: int | None = None
        self._direction = 0
        self._num_groups = 0
        self._node_sequence = -1
        self._was_outside = False
        """Whether the last operation was outside the blocks."""
        self._label = "load 0"
        self._is_pending = False
        self._pending: list[int] = []
        self._pending_from = 0

    # -- phases and blocks ---------------------------------------------------------------------------------

    def mark(self, phase: str, step: int) -> None:
        """A phase begins."""
        if phase != "load":
            self.claim_results()
        if self._pending:
            self._enter(None)
        self.marks.append((len(self.events), phase, step))
        self._phase = phase
        if not self.places.stack:
            self.places.leave()
        self._label = f"{phase} {step}.{len(self.marks)}"
        self._was_outside = phase not in _BY_ARGUMENT
        self._begin_group(len(self.events))
        self._node_sequence = -1

    def _begin_group(self, start: int) -> None:
        self._num_groups += 1
        self._layer = None
        self._visited.clear()
        self._previous, self._direction = None, 0
        self.stretches.append((start, f"{self._label} #{self._num_groups}", None))

    def _enter(self, layer: int | None) -> None:
        """
        Events belong to this block from here on. A group of stretches visits each block once, in one direction; where
        the code turns round, a new group begins.
        """
        start = len(self.events)
        if self._pending:
            # What was made without reference to any tensor is of the block whose tensor comes next.
            start = self._pending_from
            for storage_id in self._pending:
                self._owner[storage_id] = (layer, self._num_groups)
            self._pending.clear()
        if layer == self._layer:
            return
        if layer is not None:
            previous, direction = self._previous, self._direction
            turn = 0 if previous is None else (1 if layer > previous else -1)
            if layer in self._visited or turn * direction < 0:
                self._begin_group(start)
                turn = 0
            self._visited.add(layer)
            self._previous, self._direction = layer, turn or self._direction
        self._layer = layer
        self.stretches.append((start, f"{self._label} #{self._num_groups}", layer))

    def _locate(self, args: tuple[Any, ...]) -> Place:
        """Where the code is: the module that runs, or in backward the one whose node does."""
        places = self.places
        if self._phase in _BY_ARGUMENT and not places.stack:
            owner = self._owner_of(args)
            if _is_list_of_tensors(args):  # those of all blocks
                self._is_pending = False
                self._enter(None)
            elif owner is None:
                self._is_pending = True
            else:
                self._is_pending = False
                self._enter(owner[0])
            return _OPTIMIZER if self._phase == "optimizer_step" else places.current
        self._is_pending = False
        if not places.stack:
            node = torch._C._current_autograd_node()
            if node is None:
                places.leave()
            else:
                sequence = node._sequence_nr()
                # AccumulateGrad nodes have no number: they belong to the node before.
                if sequence != self._node_sequence and sequence < 1 << 62:
                    self._node_sequence = sequence
                    places.current = places.of_sequence(sequence)
        place = places.current
        self._enter(place.layer)
        self._was_outside = place.layer is None
        return place

    def _owner_of(self, args: tuple[Any, ...]) -> tuple[int | None, int] | None:
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.device.type == self.device_type:
            storage_id = self._live.get(first.untyped_storage()._cdata)
            if storage_id:
                return self._owner[storage_id]
        return None

    # -- storages ------------------------------------------------------------------------------------------

    def _record(self, num_bytes: int, category: str, name: str, tensor: torch.Tensor | None) -> int:
        storage_id = len(self.sizes)
        self.sizes.append(num_bytes)
        dtype = None if tensor is None else str(tensor.dtype).removeprefix("torch.")
        shape = None if tensor is None else tuple(tensor.shape)
        path = self.places.current.path or _OUTSIDE_MODULES.get(self._phase, "")
        stream = self.stream()
        if stream:
            self.streams[storage_id] = stream
            category = "comm"
        self.info.append((category, path, name, dtype, shape))
        if self._is_pending:
            if not self._pending:
                self._pending_from = len(self.events)
            self._pending.append(storage_id)
        self.events.append(storage_id)
        self._owner[storage_id] = (self._layer, self._num_groups)
        return storage_id

    def _allocate(self, tensor: torch.Tensor, category: str, name: str) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        num_bytes = storage.nbytes()
        # The caching allocator is not asked for 0 bytes (CUDACachingAllocator.cpp, allocate).
        storage_id = self._record(num_bytes, category, name, tensor) if num_bytes else _NOTHING
        self._live[key] = storage_id
        self._references[key] = weakref.ref(storage, lambda _: self._die(key))
        return storage_id

    def _die(self, key: int) -> None:
        self._references.pop(key, None)
        self._emptied.pop(key, None)
        storage_id = self._live.pop(key, None)
        if storage_id is not None:
            self._free(storage_id)

    def _free(self, storage_id: int) -> None:
        if storage_id == _NOTHING:
            return
        layer, group = self._owner.pop(storage_id)
        # Lists and caches let go of what all blocks hold, one block after the other; a local goes when the next takes
        # its place.
        is_next = group == self._num_groups and self._layer is not None
        by_owner = self._phase in _BY_ARGUMENT and not self.places.stack and not is_next
        if by_owner or (self._was_outside and layer is not None):
            self._enter(layer)
        self.events.append(-storage_id)

    def adopt(self, tensor: torch.Tensor, category: str, name: str, layer: int | None = None) -> None:
        """A tensor that exists becomes an allocation now: a parameter, a buffer, an input; if it is on the device."""
        if self.host is not None and self.host.holds(tensor):
            return
        if self._is_new(tensor):
            self._enter(layer)
            self._allocate(tensor, category, name)

    def _is_new(self, tensor: Any) -> bool:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != self.device_type:
            return False
        return tensor.untyped_storage()._cdata not in self._live

    def scratch(self, num_bytes: Iterable[int], name: str) -> None:
        """Memory that an operation takes and gives back inside itself, all of it at once."""
        held = [self._record(size, "workspace", name, None) for size in num_bytes if size]
        for storage_id in reversed(held):
            self._owner.pop(storage_id)
            self.events.append(-storage_id)

    def persistent(self, num_bytes: int, name: str) -> None:
        """Memory that a library keeps."""
        self._record(num_bytes, "workspace", name, None)

    def name(self, tensor: torch.Tensor, category: str, name: str) -> None:
        """Say what a recorded storage turned out to be: a gradient, an optimizer's state."""
        storage_id = self._live.get(tensor.untyped_storage()._cdata)
        if storage_id:
            _, _, _, dtype, shape = self.info[storage_id]
            self.info[storage_id] = (category, "", name, dtype, shape)

    def claim_results(self) -> None:
        """Name what parameters and optimizers hold; `watch` says which they are."""
        for claim in self._claims:
            claim()

    _claims: tuple[Callable[[], None], ...] = ()

    def watch(
        self, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Name gradients and states of these parameters at every mark."""
        seen: set[int] = set()

        def claim() -> None:
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    self.name(_local(parameter.grad), "gradients", f"{name} grad")
                if optimizer is None or id(parameter) in seen:
                    continue
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor):
                        self.name(_local(value), "optimizer", f"{name} {key}")
                        seen.add(id(parameter))

        self._claims = (*self._claims, claim)

    # -- resizing ------------------------------------------------------------------------------------------

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

    def _resize(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage._cdata
        storage_id = self._live.get(key)
        if storage_id is None or storage.nbytes() == num_bytes:
            return
        _, path, _, dtype, shape = self.info[storage_id or self._emptied.pop(key, _NOTHING)]
        self._free(storage_id)
        if num_bytes:
            fresh = self._record(num_bytes, "comm", "gathered weights", None)
            self.info[fresh] = ("comm", path, "gathered weights", dtype, shape)
        else:
            fresh = _NOTHING
            self._emptied[key] = storage_id
        self._live[key] = fresh

    # -- dispatch ------------------------------------------------------------------------------------------

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
        if self.workspace_bytes and (operation.is_product or self._phase == "backward"):
            self._claim_workspace()
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
        if operation.scratch is not None and self.kernel_scratch:
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
            scratch=SCRATCH.get(name),
            is_product=name in PRODUCTS,
            is_pure=self.device_type == "meta" and _is_pure(func._schema),
            writes=func._schema.is_mutable and isinstance(func._schema.arguments[0].type, torch.TensorType),
        )
        return operation

    def _see(self, out: Any, category: str, name: str) -> None:
        tensors = (out,) if isinstance(out, torch.Tensor) else out if isinstance(out, (list, tuple)) else ()
        for tensor in tensors:
            if self._is_new(tensor):
                self._allocate(tensor, category, name.removeprefix("aten::"))

    def see(self, tensor: torch.Tensor, name: str) -> None:
        """A fresh tensor that a handler returns."""
        self._see(tensor, self.places.current.category, name)

    def num_tensors(self, tensors: Sequence[torch.Tensor]) -> int:
        """How many tensors these are in the whole model."""
        owners = (self._owner_of((tensor,)) for tensor in tensors)
        layers = (None if owner is None else owner[0] for owner in owners)
        return sum(1 if layer is None else self.multiplicity.get(layer, 1) for layer in layers)

    def _count_all(self, out: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """A list of what every block made is as long as the whole model is deep."""
        storage_id = self._live[out.untyped_storage()._cdata]
        self.sizes[storage_id] = self.sizes[storage_id] * self.num_tensors(tensors) // len(tensors)

    def new_like(self, tensor: torch.Tensor, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A fresh tensor, for handlers: same shape, strides and block as `tensor`."""
        out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device="meta")
        if self._phase in _BY_ARGUMENT and not self.places.stack:
            owner = self._owner_of((tensor,))
            self._enter(None if owner is None else owner[0])
        category = "workspace" if self._phase == "optimizer_step" else self.places.current.category
        self._allocate(out, category, name)
        return out

    def _claim_workspace(self) -> None:
        # The thread that runs backward has a cuBLAS handle of its own. Its workspace comes with its first product; here
        # it comes as backward begins, so that blocks stay alike.
        thread = "forward" if torch._C._current_autograd_node() is None else "backward"
        if thread not in self._workspaces:
            self._workspaces.add(thread)
            self.persistent(self.workspace_bytes, f"cuBLAS workspace ({thread})")

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


def _is_list_of_tensors(args: tuple[Any, ...]) -> bool:
    first = args[0] if args else None
    return isinstance(first, (list, tuple)) and bool(first) and isinstance(first[0], torch.Tensor)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


_OPTIMIZER = Place("", None, "workspace")
"""What an optimizer makes and does not keep; what it keeps is named afterwards."""

_NOTHING = 0
"""In place of the id of a storage of no bytes."""

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
