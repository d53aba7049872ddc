"""Every figure of the scratch table says where it comes from and how far it is known."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from memplan.tape import scratch
from memplan.tape.scratch import SOURCES

TAPE = Path(scratch.__file__).parent

OTHERS = {
    "'row numbers'", "'gradients in equal parts'",
    "'one'", "f'{name} being packed'", "f'{name} before it is cut'", '"gloo\'s copy of what is gathered"',
    '"gloo\'s copy of what is reduced"', "f'{name} largest value of the code'", "'a tensor of the checkpoint'",
}  # fmt: skip
"""
Short-lived tensors that operations return, not inside one; the 1 that Liger compares a gradient with; bitsandbytes,
FSDP, and gloo and checkpoints on a CPU.
"""


def _functions() -> set[str]:
    """Those that compute what an operation takes."""
    return {
        name
        for name, function in inspect.getmembers(scratch, inspect.isfunction)
        if function.__module__ == scratch.__name__
        and inspect.signature(function).return_annotation == "list[int]"
    }


def test_every_figure_has_a_source() -> None:
    """And none has two names; what no function computes is not counted, and says so."""
    counted = {name for name, source in SOURCES.items() if source.is_counted}
    assert _functions() == counted
    assert all(source.where and source.takes for source in SOURCES.values())
    assert {source.status for source in SOURCES.values()} <= {"read", "measured", "unknown"}
    assert all(source.takes == "not counted" for source in SOURCES.values() if not source.is_counted)
    assert not any(source.operators for source in SOURCES.values() if not source.is_counted)


def test_every_operator_of_the_trace_is_in_the_table() -> None:
    pytest.importorskip("torch")
    from memplan.tracing.cuda import handlers
    from memplan.tracing.scratch import SCRATCH, SUMS

    named = {f"aten::{operator}" for source in SOURCES.values() for operator in source.operators}
    assert set(SCRATCH) <= named
    assert named - set(SCRATCH) - set(SUMS) == {"aten::_foreach_norm"} <= set(handlers(1, 1))


def test_the_shape_writer_takes_scratch_from_the_table_only() -> None:
    """A figure of its own would have no source."""
    assert {
        label for label, text in _takers() if not any(f"{name}(" in text for name in _functions())
    } == OTHERS


def _takers() -> list[tuple[str, str]]:
    """Of every call of `Graph.scratch`: what it is named, and the code of the function that makes it."""
    found = []
    for path in sorted(TAPE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                found += [
                    (ast.unparse(word.value), ast.unparse(function))
                    for node in ast.walk(function)
                    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "scratch"
                    for word in node.keywords
                    if word.arg == "name"
                ]
    return found
