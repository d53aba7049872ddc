"""
torch's compiler, kept out of a process that only traces.

`torch._dynamo` is imported by the first checkpoint, the first optimizer step and the first call of a dispatch mode
(torch/_compile.py, torch/optim/optimizer.py), to tell a compiler that is not running to leave them alone. That takes
longer than a trace.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NAME = "torch._dynamo"


class _Idle(ModuleType):
    """What is asked of a compiler where nothing is compiled; the real one is imported for anything else."""

    def __init__(self, folder: str) -> None:
        super().__init__(NAME)
        self.__path__ = [folder]  # its submodules can be imported: transformers does
        self.config = SimpleNamespace(error_on_nested_fx_trace=True)
        self.graph_break = self.mark_static_address = _nothing
        self.disable = _unchanged
        self.assume_constant_result = self.allow_in_graph = _unchanged

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(self), name)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _unchanged(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A decorator, with arguments or without."""
    return _unchanged if function is None else function


def _real(stand_in: ModuleType) -> ModuleType:
    if sys.modules.get(NAME) is stand_in:
        del sys.modules[NAME]
    return importlib.import_module(NAME)


@contextmanager
def without_compiler() -> Iterator[None]:
    """
    Answer for `torch._dynamo` as long as nobody has imported it.

    For a process of memplan's own alone: functions of torch and transformers that are decorated meanwhile stay as they
    are, so that compiling them later would not be what it is elsewhere.
    """
    torch = find_spec("torch")
    if NAME in sys.modules or torch is None or torch.origin is None:
        yield
        return
    stand_in = _Idle(str(Path(torch.origin).parent / "_dynamo"))
    sys.modules[NAME] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(NAME) is stand_in:
            del sys.modules[NAME]
