"""Where code is in the model: which module runs, and for a node of the graph, which module made it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LAYER = "{layer}"
"""Stands in paths for the index of a repeated block."""

_PEFT = ("base_model", "base_model.model")
"""Modules that peft puts around a model."""


@dataclass(frozen=True)
class Place:
    """A module path; the block it is in, if any; and the category of what it allocates."""

    path: str
    layer: int | None
    category: str


_OUTSIDE = Place("", None, "logits_loss")


class Places:
    """
    Follows calls of the modules it was told about. `current` is where the code is; `stack` is empty outside modules.

    Nodes of the graph are numbered in the order they are made (`sequence_nr`), so that the numbers at which modules
    are entered and left tell which module a node is of.
    """

    def __init__(self) -> None:
        self.current = _OUTSIDE
        self.stack: list[Place] = []
        self._of_module: dict[int, Place] = {}
        self._sequences: list[int] = []
        self._at: list[Place] = []

    def tell(self, paths: Mapping[nn.Module, Place]) -> None:
        """Follow these modules."""
        self._of_module.update({id(module): place for module, place in paths.items()})

    def of_module(self, module: nn.Module) -> Place:
        """The place of a module; outside all of those that are followed if it is none of them."""
        return self._of_module.get(id(module), _OUTSIDE)

    def of_sequence(self, sequence: int) -> Place:
        """The place at which the node of this number was made."""
        index = bisect_right(self._sequences, sequence) - 1
        return self._at[index] if index >= 0 else _OUTSIDE

    def leave(self) -> None:
        """The code is outside all modules."""
        self.current = _OUTSIDE

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow calls. A wrapper rather than hooks: it is left also when a recomputation ends early."""
        original = nn.Module.__call__
        of_module, stack = self._of_module, self.stack

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            place = of_module.get(id(module))
            if place is None:
                return original(module, *args, **kwargs)
            stack.append(self.current)
            self._move(place)
            try:
                return original(module, *args, **kwargs)
            finally:
                self._move(stack.pop())

        nn.Module.__call__ = call
        try:
            yield
        finally:
            nn.Module.__call__ = original

    @contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """The code works for this module, without a call of it."""
        self.stack.append(self.current)
        self._move(place)
        try:
            yield
        finally:
            self._move(self.stack.pop())

    def _move(self, place: Place) -> None:
        self.current = place
        self._sequences.append(torch.autograd._get_sequence_nr())
        self._at.append(place)


def places_of(
    model: nn.Module, blocks: nn.ModuleList | None, layers: tuple[int, ...], head: nn.Module | None
) -> dict[nn.Module, Place]:
    """
    The place of every module of a model.

    Args:
        blocks: the list of repeated blocks; None if there is none.
        layers: which block of the whole model each of `blocks` is.
        head: what makes the logits: its allocations, and those outside the decoder, are of the loss.
    """
    named = dict(model.named_modules())
    prefix = next((name for name, module in named.items() if module is blocks), None)
    head_name = next((name for name, module in named.items() if module is head), "")
    places: dict[nn.Module, Place] = {}
    for name, module in named.items():
        layer = None
        path = name
        if prefix is not None and name.startswith(f"{prefix}."):
            index, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            layer = layers[int(index)]
            path = f"{prefix}.{LAYER}" + (f".{rest}" if rest else "")
        path = "" if name in _PEFT else path.removeprefix("base_model.model.")
        around_head = not name or f"{head_name}.".startswith(f"{name}.")
        is_loss = around_head or (head_name != "" and f"{name}.".startswith(f"{head_name}."))
        places[module] = Place(path, layer, "logits_loss" if is_loss else "activations")
    return places
