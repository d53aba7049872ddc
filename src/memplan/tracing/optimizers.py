"""bitsandbytes' optimizers on meta tensors: their states are made, their kernels are not run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from memplan.tracing.build import META
from memplan.tracing.replaced import replaced


def _paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
    """A state in managed memory, which torch's allocator does not see, and the recorder neither."""
    with _disable_current_modes():
        state = torch.empty(prod(shape), dtype=dtype, device=META).view(shape)
    state.is_paged = True
    state.page_deviceid = 0
    return state


def _map_of_4_bits(_: str, device: Any = None, blocksize: int = 64) -> torch.Tensor:
    """As bitsandbytes' get_4bit_type, whose values a trace needs not."""
    values = torch.empty(16, device=device)
    values.div_(values.abs().max())
    return values


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextlib.contextmanager
def bitsandbytes_on_meta() -> Iterator[None]:
    """The kernels write into states and parameters that exist, so leaving them out changes no allocation."""
    from bitsandbytes import functional
    from bitsandbytes.optim import GlobalOptimManager, optimizer

    changes: list[tuple[Any, str, Any]] = [
        (functional, "get_paged", _paged),
        (functional, "fill", _nothing),
        (functional, "prefetch_tensor", _nothing),
        (functional, "optimizer_update_32bit", _nothing),
        (functional, "optimizer_update_8bit_blockwise", _nothing),
        (optimizer, "sync_gpu", _nothing),
        (GlobalOptimManager, "_instance", None),  # it remembers the parameters of every optimizer there was
    ]
    with replaced(changes):
        yield


@contextlib.contextmanager
def own_quantization_maps() -> Iterator[None]:
    """
    bitsandbytes makes the map of its nested constants once per process, on the device that asks first. A trace makes
    one of its own, and leaves real packing its own. The 16 values of 4 bits it makes for every weight, by a function
    of torch's that modes do not see on meta.
    """
    from bitsandbytes import functional

    name2qmap = functional.name2qmap
    before = dict(name2qmap)
    name2qmap.clear()
    try:
        with replaced([(functional, "get_4bit_type", _map_of_4_bits)]):
            yield
    finally:
        name2qmap.clear()
        name2qmap.update(before)
