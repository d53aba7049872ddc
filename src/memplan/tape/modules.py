"""
The modules of a model as hooks on every one of them see it: linear layers, norms and embeddings, which have parameters
of their own, and those around them, which have none.

Only ZeRO's stage 3 has such hooks (zero3_gather.py); without them a module is its program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from memplan.tape.graph import Graph
from memplan.tape.tensors import Parameter, Tensor

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False)
class Module:
    """A module by its own parameters."""

    parameters: tuple[Parameter, ...]
    adopted: dict[Parameter, None] = field(default_factory=dict)
    """Frozen parameters of others that a recomputation has fetched in this module's backward."""
    num_inputs: int = 0
    """Inputs of the last forward pass that require gradients and have none yet."""


def hooked(
    program: Callable[Concatenate[Graph, Tensor, P], Tensor],
) -> Callable[Concatenate[Graph, Tensor, P], Tensor]:
    """Run a module's program between the hooks: its arguments are its input and its own parameters."""

    @wraps(program)
    def run(g: Graph, x: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        hooks = g.hooks
        own = [] if hooks is None else [item for item in args if isinstance(item, Parameter)]
        if hooks is None or not own:
            return program(g, x, *args, **kwargs)
        return hooks.run((program.__name__, own[0]), own, (x,), lambda x: program(g, x, *args, **kwargs))

    return run


def entered(g: Graph, name: str) -> None:
    """A module without parameters of its own is called."""
    if g.hooks is not None:
        g.hooks.enter((name, g.layer))


def left(g: Graph, name: str, out: Tensor) -> Tensor:
    """It returns its output."""
    return out if g.hooks is None else g.hooks.leave((name, g.layer), out)


def called(name: str) -> Callable[[Callable[Concatenate[Graph, P], T]], Callable[Concatenate[Graph, P], T]]:
    """Run the program of a module without parameters of its own between the hooks."""

    def decorate(program: Callable[Concatenate[Graph, P], T]) -> Callable[Concatenate[Graph, P], T]:
        @wraps(program)
        def run(g: Graph, *args: P.args, **kwargs: P.kwargs) -> T:
            if g.hooks is None:
                return program(g, *args, **kwargs)
            entered(g, name)
            return _leave(g, name, program(g, *args, **kwargs))

        return run

    return decorate


def _leave(g: Graph, name: str, out: Any) -> Any:
    """Of several outputs it is the first that has a gradient."""
    return left(g, name, out) if isinstance(out, Tensor) else (left(g, name, out[0]), *out[1:])
