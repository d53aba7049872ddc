"""Where every byte of a fine-tuning job goes, whether it fits, and the smallest change that makes it fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memplan.tracing.step import Trace as Trace
    from memplan.tracing.step import trace as trace

__version__ = "0.1.0"

_LAZY = {"trace": "memplan.tracing.step", "Trace": "memplan.tracing.step"}
"""Public names that need torch, which is imported with the first use of one."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module `memplan` has no attribute `{name}`")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
