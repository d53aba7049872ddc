"""
`Storages`: the storages that live on the device, the events that they leave, and the block that each belongs to.

A weak reference to a storage fires when the C++ storage dies, which is the free. Views and in-place results share
storages, so nothing is counted twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from memplan.tracing.host import HostMemory
from memplan.tracing.places import Place, Places

_BY_ARGUMENT = frozenset({"load", "optimizer_step"})
"""Phases in which events belong to the block of the tensors that an operation is given."""

_OUTSIDE_MODULES = {"forward": "loss", "backward": "loss", "optimizer_step": "optimizer"}
"""What code outside all modules does, by phase."""


class Storages:
    """
    Of one device. `events`, `sizes`, `info`, `streams` and `stretches` have the form that
    memplan.tape.repeat.Expansion reads.

    Args:
        device_type: of the tensors that count: `meta`, or `cpu` to follow a real run.
    """

    def __init__(self, device_type: str) -> None:
        self.events: list[int] = []
        self.sizes: list[int] = [0]
        self.info: list[tuple[str, str, str, str | None, tuple[int, ...] | None]] = [("", "", "", None, None)]
        self.streams: dict[int, int] = {}
        self.recorded: set[int] = set()
        self.waits: dict[int, int] = {}
        self.stretches: list[tuple[int, str, int | None]] = [(0, "load", None)]
        self.marks: list[tuple[int, str, int]] = []
        self.places = Places()
        self.device_type = device_type
        self.stream: Callable[[], int] = lambda: 0
        self.multiplicity: dict[int, int] = {}
        """How many blocks of the whole model a traced block stands for, where that is not one."""
        self.host: HostMemory | None = None
        """Where offloaded tensors are, if the job offloads any."""
        self.pinned_peak_bytes = 0
        """Of activations in host memory, where all of them are offloaded."""
        self._live: dict[int, int] = {}
        self._emptied: dict[int, int] = {}
        """By storage that was resized to nothing, what it was."""
        self._references: dict[int, weakref.ref[Any]] = {}
        self._owner: dict[int, tuple[int | None, int]] = {}
        """By storage: its block and its group of stretches."""
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
        if self.is_new(tensor):
            self._enter(layer)
            self._allocate(tensor, category, name)

    def id_of(self, tensor: torch.Tensor) -> int:
        """Which recorded storage a tensor is a view of; 0 for none."""
        return self._live.get(tensor.untyped_storage()._cdata, _NOTHING)

    def record_stream(self, tensor: torch.Tensor) -> None:
        """Another stream than its own uses it (`Tape.recorded`)."""
        self.recorded.add(self.id_of(tensor))

    def wait(self) -> None:
        """The host waits for the device (`Tape.waits`)."""
        marker = self._record(0, "comm", "the host waits for the device", None)
        self.waits[marker] = 0
        self._owner.pop(marker)
        self.events.append(-marker)

    def is_new(self, tensor: Any) -> bool:
        """Whether a tensor is on the device and has not been seen."""
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

    def _see(self, out: Any, category: str, name: str) -> None:
        tensors = (out,) if isinstance(out, torch.Tensor) else out if isinstance(out, (list, tuple)) else ()
        for tensor in tensors:
            if self.is_new(tensor):
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

    # -- storages that change -------------------------------------------------------------------------------

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
