"""
What a graph calls while programs run: the hooks of modules (modules.py), and those of a sharded model's units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from memplan.tape.tensors import Parameter, Tensor

Key = tuple[object, ...]


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


class Units(Protocol):
    """The hooks of a sharded model, in the order in which a step calls them."""

    is_last: bool
    """Whether this micro batch is the last of its step."""
    casts_inputs: bool
    """Whether a unit casts what it is given to autocast's dtype, before its parameters are gathered."""

    def before_forward(self, layer: int | None, x: Tensor | None) -> None:
        """A unit is about to run on `x`: its parameters are there when this returns."""

    def after_forward(self, layer: int | None) -> None:
        """A unit has run."""

    def visit_backward(self, layer: int | None) -> None:
        """Backward reaches a unit."""

    def leave_backward(self, layer: int | None) -> None:
        """Backward has gone on to another one."""

    def end_backward(self) -> None:
        """Backward is over."""
