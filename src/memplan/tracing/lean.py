"""
What a process that only traces does without: half of what `import torch, transformers, peft` takes is for modules of
which a trace uses nothing. They are lazy (lazy.py), so that they come where something is asked of them.

* `torch._dynamo` is imported by the first checkpoint, the first optimizer step and the first call of a dispatch mode
  (torch/_compile.py, torch/optim/optimizer.py), to tell a compiler that is not running to leave them alone.
* sympy is imported by torch's first kernel for meta tensors, to ask whether a number is an expression
  (torch/_prims_common, elementwise_dtypes), and by conditions on sizes (sizes.py).
* torch/__init__.py imports `torch.export`, higher-order operators and quantization, to have them at hand.
* transformers reads the files of all its models for the names in them (model_names.py).
* transformers, peft and accelerate import FSDP and sharded tensors where torch has process groups.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from memplan.preflight.environment import installed_torch_version
from memplan.tape.backends import TORCH, later_than
from memplan.tracing import model_names, sizes
from memplan.tracing.lazy import Answers, Changes, asked, lazily


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _unchanged(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A decorator, with arguments or without."""
    return _unchanged if function is None else function


class _Expression:
    """Of which there are none."""


def _cond(*args: Any, **kwargs: Any) -> Any:
    return asked("torch._higher_order_ops").cond(*args, **kwargs)


def _while_loop(*args: Any, **kwargs: Any) -> Any:
    return asked("torch._higher_order_ops").while_loop(*args, **kwargs)


_LEAVES = (
    "torch.export",
    "torch.masked",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.quantization",
    "torch.utils.data.datapipes",
    "torch.utils.data.graph_settings",
    "pynvml",
)
"""Imported, and not looked at."""

LAZY = {name: Answers() for name in _LEAVES} | {
    "torch._dynamo": Answers(
        {
            "config": SimpleNamespace(error_on_nested_fx_trace=True),
            "graph_break": _nothing,
            "mark_static_address": _nothing,
            "disable": _unchanged,
            "assume_constant_result": _unchanged,
            "allow_in_graph": _unchanged,
        }
    ),
    "sympy": Answers({"Basic": _Expression}, to="torch._prims_common"),
    sizes.MODULE: Answers(sizes.ANSWERS),
    "torch._higher_order_ops": Answers({"cond": _cond, "while_loop": _while_loop}),
}


@contextmanager
def _without_process_groups() -> Iterator[Changes]:
    """
    Until then transformers, peft and accelerate are told what a torch built without them tells: they import sharded
    tensors, FSDP and its checkpoints otherwise.
    """
    original: list[Callable[[], bool]] = []

    def leave_out(module: ModuleType) -> None:
        import torch.distributed

        model_names.read_on_demand(module)
        original.append(torch.distributed.is_available)
        torch.distributed.is_available = lambda: False

    try:
        yield {model_names.IMPORT_UTILS: leave_out}
    finally:
        for function in original:
            sys.modules["torch.distributed"].is_available = function  # type: ignore[attr-defined]


@contextmanager
def without_the_unused(*, alone: bool = False) -> Iterator[None]:
    """
    Leave out what a trace does not use, as long as nobody has imported it; it comes when more is asked of it.

    With a torch later than 2.13 nothing is left out, which takes longer: its modules import each other in another
    order (2.15 reaches torch.fx from torch._logging), and which of them can wait was read up to 2.13.

    For a process of memplan's own: functions of torch and transformers that are decorated meanwhile stay as they
    are, so that compiling them later would not be what it is elsewhere.

    Args:
        alone: the job is of one process, and no other follows: process groups are left out for good.
    """
    if later_than(TORCH, installed_torch_version()):
        yield
        return
    with ExitStack() as stack:
        changes: Changes = {model_names.IMPORT_UTILS: model_names.read_on_demand}
        if alone:
            changes = stack.enter_context(_without_process_groups())
        stack.enter_context(lazily(LAZY, changes))
        yield
