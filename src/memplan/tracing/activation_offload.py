"""
All that backward needs in host memory, as TRL's OffloadActivations moves it (TRL 1.16, models/activation_offloading.py;
from torchtune), on meta tensors.

A saved tensor goes to pinned memory as it is saved, and comes back for the node that needs it. With a stream of their
own for copies, the last few tensors stay until the copy is surely done, and what has come back stays until the next
node has run. What stays on the device: parameters, tensors of less than 1024 bytes, what the head saves, and a tensor
that is saved again while it is kept for its copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from memplan.budget.host_sizes import pinned_bytes
from memplan.tracing.recorder import Recorder

SMALLEST_BYTES = 1024
MAX_STASH = 5
"""`max_fwd_stash_size`: so many saved tensors later one is let go, those that stay counted too."""
TRANSFER_STREAM = 5
"""Of the copies; beside those of sharding (tape/sharded/sharding.py)."""


_Key = tuple[int, int, torch.dtype]
"""Storage, offset and dtype: TRL knows by them what is saved again."""


class _Kept:
    """A saved tensor that has stayed."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Moved:
    """A saved tensor in host memory: what it takes to make it again."""

    __slots__ = ("dtype", "num_bytes", "offset", "shape", "storage_bytes", "stride", "values")

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.offset = tensor.storage_offset()
        is_broadcast = 0 in self.stride
        self.storage_bytes = tensor.untyped_storage().nbytes() if is_broadcast else tensor.nbytes
        self.num_bytes = pinned_bytes(self.storage_bytes)
        self.values = getattr(tensor, "_shadow", None)
        """Where they are known (shadow.py)."""


class OffloadedActivations(saved_tensors_hooks):
    """
    Around forward and backward of a micro batch.

    Args:
        parameters: storages of these stay, whatever view of them is saved.
        streams: copies run beside the step; else they are waited for.
    """

    def __init__(self, recorder: Recorder, model: nn.Module, *, streams: bool) -> None:
        self.recorder = recorder
        self.streams = streams
        self.live_bytes = self.peak_bytes = 0
        """Of pinned memory."""
        self._parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._node: Any = None
        """The node whose tensors came last: it and what it refers to live until another takes its place."""
        self._clear()
        super().__init__(self._pack, self._unpack_beside if streams else self._unpack_in_line)

    def _clear(self) -> None:
        self._count = 0
        self._saved: dict[int, _Kept | _Moved] = {}
        self._stash: dict[int, Tensor] = {}
        self._fetched: dict[int, Tensor] = {}
        self._number_of: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        self._is_in_backward = False
        self._graph = -1

    def __enter__(self) -> None:
        self._clear()
        super().__enter__()

    def __exit__(self, *args: object) -> None:
        self._stash.clear()
        self._fetched.clear()
        if self.streams:
            self.recorder.wait()
        super().__exit__(*args)

    # -- forward -------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> int:
        self._count += 1
        number, key = self._count, (self.recorder.id_of(tensor), tensor.storage_offset(), tensor.dtype)
        if self.streams and key in self._number_of:
            self._saved[number] = _Kept(tensor)
            self._track(number, key)
            return number
        if tensor.nbytes < SMALLEST_BYTES or isinstance(tensor, nn.Parameter) or self._is_weight(tensor):
            self._saved[number] = _Kept(tensor)
            return number
        if 0 not in tensor.stride() and (not tensor.is_contiguous() or tensor.storage_offset() != 0):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        if self.streams:
            for earlier in list(self._stash):
                if earlier > number - MAX_STASH:
                    break
                self._let_go(earlier)
            self._stash[number] = tensor
            self._track(number, key)
        moved = self._saved[number] = _Moved(tensor)
        self.live_bytes += moved.num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return number

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._parameters

    def _track(self, number: int, key: _Key) -> None:
        self._number_of[key], self._key_of[number] = number, key

    def _untrack(self, number: int) -> None:
        key = self._key_of.pop(number, None)
        if key is not None and self._number_of.get(key) == number:
            del self._number_of[key]

    def _let_go(self, number: int) -> None:
        del self._stash[number]
        self._untrack(number)

    # -- backward ------------------------------------------------------------------------------------------

    def _unpack_in_line(self, number: int) -> Tensor:
        saved = self._take(number)
        return saved.tensor if isinstance(saved, _Kept) else self._fetch(saved)

    def _unpack_beside(self, number: int) -> Tensor:
        if not self._is_in_backward:
            self._is_in_backward = True
            self._graph = torch._C._current_graph_task_id()
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._fetched.clear)
        saved = self._saved[number]
        if isinstance(saved, _Kept):
            self._take(number)
            return saved.tensor
        node = torch._C._current_autograd_node()
        before = []
        if torch._C._current_graph_task_id() == self._graph and self._node is not node:
            self._node = node
            before = list(self._fetched)
        comes_back = number not in self._stash
        references = 0
        if comes_back:
            with self._beside():
                tensor = self._fetch(saved)
            self._fetched[number] = tensor
            references = _use_count(tensor)
        else:
            tensor = self._stash[number]
        assert node is not None
        node.register_hook(lambda outputs, _: self._after(number, before, references, comes_back=comes_back))
        self._take(number)
        return tensor

    def _after(self, number: int, before: list[int], references: int, *, comes_back: bool) -> None:
        """The node that needed a tensor has run."""
        if comes_back and number in self._fetched and _use_count(self._fetched[number]) > references:
            self.recorder.record_stream(self._fetched.pop(number))  # somebody else has a view of it
        for earlier in list(self._stash):
            self._let_go(earlier)
        for earlier in before:
            self._fetched.pop(earlier, None)

    def _take(self, number: int) -> _Kept | _Moved:
        saved = self._saved.pop(number)
        self._untrack(number)
        if isinstance(saved, _Moved):
            self.live_bytes -= saved.num_bytes
        return saved

    def _fetch(self, saved: _Moved) -> Tensor:
        """A copy on the device, as `to` and then `as_strided` make it."""
        flat = torch.empty(saved.storage_bytes // saved.dtype.itemsize, dtype=saved.dtype, device="meta")
        self.recorder.name(flat, "activations", "activation copied from host memory")
        with _disable_current_modes():
            tensor = flat.as_strided(saved.shape, saved.stride, saved.offset)
        return tensor if saved.values is None else self.recorder.shadows.give(tensor, saved.values)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        outer = self.recorder.stream
        self.recorder.stream = lambda: TRANSFER_STREAM
        try:
            yield
        finally:
            self.recorder.stream = outer


def _use_count(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


class _Nothing(saved_tensors_hooks):
    """What is saved inside stays (TRL's NoOpManager)."""

    def __init__(self) -> None:
        super().__init__(lambda tensor: tensor, lambda tensor: tensor)


def leave_head(model: nn.Module) -> None:
    """The head of a model, as TRL finds it (get_act_offloading_ctx_manager), saves what it saves on the device."""
    head = _head_of(getattr(model, "base_model", model) if hasattr(model, "peft_config") else model)
    if head is None:
        return
    nothing = _Nothing()
    head.register_forward_pre_hook(lambda *_: nothing.__enter__())
    head.register_forward_hook(lambda *_: nothing.__exit__(None, None, None), always_call=True)


def _head_of(model: Any) -> Any:
    if hasattr(model, "output"):
        output = model.output
        return output if isinstance(output, nn.Module) else getattr(output, "linear", None)
    if hasattr(model, "lm_head"):
        return model.lm_head
    if hasattr(model, "decoder"):
        return getattr(model.decoder, "output", getattr(model.decoder, "lm_head", None))
    for name in ("final_layer_norm", "ln_f", "head"):
        if hasattr(model, name):
            return getattr(model, name)
    return None
