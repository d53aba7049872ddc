"""What code that was written for a GPU has to find around it, so that it runs on meta tensors as it is."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from memplan.tracing.build import META
from memplan.tracing.replaced import replaced
from memplan.tracing.shadow import MAX_INTEGERS

_CUDA = re.compile(r"cuda(:\d+)?")


class _ToMeta(TorchFunctionMode):
    """Devices named `cuda` are meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0].to(META)
        if isinstance(kwargs.get("device"), int):
            kwargs = kwargs | {"device": META}
        return func(*map(_redirected, args), **{key: _redirected(value) for key, value in kwargs.items()})


def _redirected(value: Any) -> Any:
    if isinstance(value, torch.device):
        return META if value.type == "cuda" else value
    return META if isinstance(value, str) and _CUDA.fullmatch(value) else value


@contextmanager
def devices_are_meta(device: str) -> Iterator[None]:
    """`.to("cuda")`, `.cuda()` and `device="cuda"` give meta tensors; for `cpu` so does what names no device."""
    with _ToMeta(), replaced(_WITHOUT_A_DRIVER), META if device == "cpu" else nullcontext():
        yield


def _nothing(*_: Any, **__: Any) -> None:
    pass


_WITHOUT_A_DRIVER = [(torch.cuda, name, _nothing) for name in ("synchronize", "empty_cache", "ipc_collect")]
"""What waits or tidies up, which a step on meta tensors has no need of; a torch without CUDA would raise."""


@contextmanager
def compiled_calls() -> Iterator[list[None]]:
    """Calls of what `torch.compile` made, a function in the step too, which here run as they are written."""
    from torch._dynamo import eval_frame

    calls: list[None] = []
    choose = eval_frame._callback_from_stance

    def chosen(callback: Any) -> Any:
        if callable(callback):  # None and False are of what is not to be compiled
            calls.append(None)
        return choose(callback)

    with replaced([(eval_frame, "_callback_from_stance", chosen)]):
        yield calls


def torch_functions() -> dict[int, tuple[Any, Any, str]]:
    """Functions of torch and torch.nn.functional as they are now, by id: (function, owner, name)."""
    return {
        id(value): (value, owner, name)
        for owner in (torch, F, torch.nn.utils)
        for name, value in vars(owner).items()
        if callable(value) and not isinstance(value, type)
    }


@contextmanager
def followed_imports(before: dict[int, tuple[Any, Any, str]]) -> Iterator[None]:
    """
    Functions that were replaced since `before` are replaced as well in modules that had imported them by name
    (`from torch.nn.functional import scaled_dot_product_attention`).
    """
    changed: dict[int, Callable[..., Any]] = {}
    for key, (function, owner, name) in before.items():
        current = getattr(owner, name)
        if current is not function:
            changed[key] = current
    bound: list[tuple[dict[str, Any], str, Any]] = []
    for module_name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if names is None or module_name.partition(".")[0] in ("torch", "memplan"):
            continue
        bound += [
            (names, name, value)
            for name, value in list(names.items())
            if id(value) in changed and callable(value)
        ]
    for names, name, value in bound:
        names[name] = changed[id(value)]
    try:
        yield
    finally:
        for names, name, value in bound:
            names[name] = value


@contextmanager
def all_finite() -> Iterator[None]:
    """Values are taken to be finite: code that skips a step on `nan` does not, and gradient scalers step."""

    def answering(function: Callable[..., Any], answer: bool) -> Callable[..., Any]:
        def ask(tensor: Any, *arguments: Any, **options: Any) -> Any:
            out = function(tensor, *arguments, **options)
            is_unknown = isinstance(out, Tensor) and out.device.type == "meta" and not hasattr(out, "_shadow")
            if is_unknown and out.numel() <= MAX_INTEGERS:
                out._shadow = torch.full(out.shape, answer, device="cpu")
            return out

        return ask

    def step(_: Any, optimizer: Any, __: Any, *arguments: Any, **options: Any) -> Any:
        return optimizer.step(*arguments, **options)

    scaler = torch.amp.GradScaler
    changes: list[tuple[Any, str, Any]] = [(scaler, "_maybe_opt_step", step)]
    for owner in (torch, Tensor):
        for name, answer in (("isnan", False), ("isinf", False), ("isfinite", True)):
            changes.append((owner, name, answering(getattr(owner, name), answer)))
    with replaced(changes):
        yield
