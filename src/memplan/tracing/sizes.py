"""
Conditions on sizes, where sizes are numbers.

Torch's kernels for meta tensors ask `torch.fx.experimental.symbolic_shapes` whether such conditions hold, which imports
sympy. For numbers there is nothing to find out; for anything else that module is asked after all.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from memplan.tracing.lazy import asked

MODULE = "torch.fx.experimental.symbolic_shapes"


def _where(is_plain: Callable[[Any], bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Answer here for values of which this holds, and for lists of them; for others in torch."""

    def holds(value: Any) -> bool:
        return is_plain(value) or (type(value) in (tuple, list) and all(map(holds, value)))

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def answer(*values: Any, **options: Any) -> Any:
            if not options and all(map(holds, values)):
                return function(*values)
            return getattr(asked(MODULE), function.__name__)(*values, **options)

        return answer

    return decorate


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_int(value: Any) -> bool:
    return type(value) is int


def _has_plain_sizes(value: Any) -> bool:
    """Whether this is an ordinary tensor whose sizes are numbers."""
    if not hasattr(value, "untyped_storage") or type(value).__name__ not in ("Tensor", "Parameter"):
        return False
    return all(type(size) is int for size in (*value.size(), *value.stride(), value.storage_offset()))


@_where(_is_bool)
def guard_or_false(a: bool) -> bool:
    return a


@_where(_is_bool)
def guard_or_true(a: bool) -> bool:
    return a


@_where(_is_bool)
def statically_known_true(x: bool) -> bool:
    return x


@_where(_is_bool)
def sym_and(x: bool, *others: bool) -> bool:
    return all((x, *others))


@_where(_is_bool)
def sym_or(x: bool, *others: bool) -> bool:
    return any((x, *others))


@_where(_is_int)
def sym_eq(x: Any, y: Any) -> bool:
    if type(x) is int or type(y) is int:
        return bool(operator.eq(x, y))
    return len(x) == len(y) and all(map(sym_eq, x, y))


@_where(_is_int)
def is_nested_int(s: int) -> bool:
    return False


@_where(_is_int)
def has_guarding_hint(a: int) -> bool:
    return True


@_where(_is_int)
def guarding_hint_or_throw(a: int) -> int:
    return a


@_where(_is_int)
def has_hint(a: int) -> bool:
    """`has_guarding_hint`, as torch 2.11 calls it."""
    return True


@_where(_is_int)
def size_hint(a: int) -> int:
    """`guarding_hint_or_throw`, as torch 2.11 calls it."""
    return a


@_where(_is_int)
def guard_int(a: int) -> int:
    return a


@_where(_is_bool)
def guard_size_oblivious(expr: bool) -> bool:
    return expr


@_where(_is_bool)
def expect_true(a: bool) -> bool:
    return a


@_where(_has_plain_sizes)
def free_unbacked_symbols(x: Any) -> Any:
    from torch.utils._ordered_set import OrderedSet

    return OrderedSet()


ANSWERS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        guard_or_false,
        guard_or_true,
        statically_known_true,
        sym_and,
        sym_or,
        sym_eq,
        is_nested_int,
        has_guarding_hint,
        guarding_hint_or_throw,
        has_hint,
        size_hint,
        guard_int,
        guard_size_oblivious,
        expect_true,
        free_unbacked_symbols,
    )
}
