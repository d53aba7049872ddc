"""Attributes of libraries that are others for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_INHERITED = object()


@contextmanager
def replaced(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """
    Within, every (owner, name, value) holds; afterwards all is as it was, also what an owner had from its class.
    """
    _known_to_torch()
    changes = list(changes)
    before = [(owner, name, vars(owner).get(name, _INHERITED)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@cache
def _known_to_torch() -> None:
    """
    Has torch look at its functions while they are its own, where it keeps what it saw when it first looked: if that was
    a replaced one, it would not know its own for the rest of the process.

    * `with torch.device(...)` keeps which functions take a device (torch/utils/_device.py, _device_constructors).
    * `torch._dynamo` keeps which functions it can compile (torch/_dynamo/trace_rules.py, get_torch_obj_rule_map). An
      optimizer, a checkpoint or a dispatch mode imports it, so that every trace does.
    """
    import torch._dynamo

    with torch.device("meta"):
        torch.empty(0)
