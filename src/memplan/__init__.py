"""Where every byte of a fine-tuning job goes, whether it fits, and the smallest change that makes it fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.exports import lazy_exports

if TYPE_CHECKING:
    from memplan.tracing.sharded import fake_process_group as fake_process_group
    from memplan.tracing.step import Trace as Trace
    from memplan.tracing.step import trace as trace

__version__ = "0.1.0"

__getattr__ = lazy_exports(
    __name__, {"tracing.step": ("Trace", "trace"), "tracing.sharded": ("fake_process_group",)}
)
"""Public names that need torch, which is imported with the first use of one."""
