"""
Outputs of operations on meta tensors, remembered by the shapes of their inputs.

Most meta kernels are Python and take a hundred times as long as making an empty tensor. The blocks of a model and the
steps of a loop ask the same again and again.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

MAX_ENTRIES = 100_000

_Specs = tuple[bool, list[tuple[Any, Any, torch.dtype]]]
"""Whether a tuple is returned, and (size, stride, dtype) of each output."""

_known: dict[Hashable, _Specs | None] = {}
"""None: the call must be made."""


def outputs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    What `func(*args, **kwargs)` returns on meta tensors, for operations that return fresh tensors and change none.
    """
    try:
        key = (func, _key(args), _key(tuple(kwargs.items())))
        is_known = key in _known
    except TypeError:  # something that cannot be hashed, such as a generator
        return func(*args, **kwargs)
    known = _known[key] if is_known else None
    if known is not None:
        is_tuple, specs = known
        return tuple(_make(*spec) for spec in specs) if is_tuple else _make(*specs[0])
    out = func(*args, **kwargs)
    if not is_known:
        if len(_known) >= MAX_ENTRIES:
            _known.clear()
        _known[key] = _specs(out, args)
    return out


def _key(items: tuple[Any, ...]) -> tuple[Hashable, ...]:
    key: list[Hashable] = []
    for item in items:
        if isinstance(item, Tensor):
            key.append((item.shape, item.stride(), item.dtype, item.device))
        elif isinstance(item, (list, tuple)):
            key.append(_key(tuple(item)))
        else:
            key.append((type(item), item))
    return tuple(key)


def _make(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _specs(out: Any, args: tuple[Any, ...]) -> _Specs | None:
    """None where an output is not a tensor that fills a storage of its own."""
    tensors = out if isinstance(out, tuple) else (out,)
    storages = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
    specs = []
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.device.type != "meta" or tensor.storage_offset():
            return None
        storage = tensor.untyped_storage()
        made = _make(tensor.size(), tensor.stride(), tensor.dtype)
        if storage._cdata in storages or storage.nbytes() != made.untyped_storage().nbytes():
            return None
        storages.add(storage._cdata)
        specs.append((tensor.size(), tensor.stride(), tensor.dtype))
    return isinstance(out, tuple), specs
