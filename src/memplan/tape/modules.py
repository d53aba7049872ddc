"""
The modules of a model as hooks on every one of them see it: linear layers, norms and embeddings, which have parameters
of their own, and those around them, which have none.

Only ZeRO's stage 3 has such hooks (zero3_gather.py); without them a module is its program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from memplan.tape.tensors import Parameter, Tensor

if TYPE_CHECKING:
    from memplan.tape.engine import Graph

P = ParamSpec("P")
T = TypeVar("T")
Key = tuple[object, ...]


@dataclass(eq=False)
class Module:
    """A module by its own parameters."""

    parameters: tuple[Parameter, ...]
    adopted: dict[Parameter, None] = field(default_factory=dict)
    """Frozen parameters of others that a recomputation has fetched in this module's backward."""
    num_inputs: int = 0
    """Inputs of the last forward pass that require gradients and have none yet."""


class Hooks(Protocol):
    """What runs before and after every module."""

    def run(
        self,
        key: Key,
        parameters: Sequence[Parameter],
        inputs: Sequence[Tensor | None],
        forward: Callable[..., Tensor],
    ) -> Tensor:
        """`forward(*inputs)` between the hooks of the module that is called `key`."""

    def enter(self, key: Key, x: Tensor | None = None) -> Tensor | None:
        """The hooks before a module without parameters; what they return takes the place of its input."""

    def touch(self, key: Key, parameter: Parameter) -> None:
        """The module that is called `key` reads another one's parameter."""

    def leave(self, key: Key, out: Tensor) -> Tensor:
        """The hooks after a module; what they return takes the place of its output."""


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
