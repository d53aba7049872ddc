"""
What the shape-only PyTorch of `graph.py` is made of: storages, tensors that are views of them, and autograd nodes.

A storage writes its free when Python drops its last reference, as it does when PyTorch's reference count drops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ITEMSIZE = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "int8": 1, "bool": 1,
    "float8_e4m3fn": 1,
}  # fmt: skip

Shape = tuple[int, ...]
Gradients = list["Tensor | None"]


class Storage:
    """One allocation; freed with its last reference."""

    __slots__ = ("events", "id")

    def __init__(self, events: list[int], storage_id: int) -> None:
        self.id = storage_id
        self.events = events

    def __del__(self) -> None:
        self.events.append(-self.id)


class Tensor:
    """
    A view of a storage.

    `transposed`: two dimensions are swapped against the order in memory. `view`: made from another tensor, which it
    keeps alive as autograd's views do; a gradient that is one is never added to in place. `columns`: the last two
    dimensions are swapped, as in the gradient of a product's second operand that was seen transposed.
    """

    __slots__ = ("columns", "dtype", "needs_grad", "node", "shape", "slot", "storage", "transposed", "view")

    def __init__(self, shape: Shape, dtype: str, storage: Storage | None, transposed: bool = False) -> None:
        self.shape = shape
        self.dtype = dtype
        self.storage = storage
        self.transposed = transposed
        self.view = self.columns = False
        self.needs_grad = False
        self.node: Node | None = None
        self.slot = 0


class Parameter(Tensor):
    """
    A leaf. Trainable ones collect their gradient in `grad`; all know the block (`layer`) they belong to.

    Shape and dtype are those the model computes with. A sharded parameter keeps `local_shape` of it in
    `stored_dtype`, and its reduced gradient in `sharded_grad`.
    """

    __slots__ = ("grad", "layer", "local_shape", "name", "sharded_grad", "stored_dtype")

    def __init__(
        self, name: str, shape: Shape, dtype: str, storage: Storage, layer: int | None, trainable: bool
    ) -> None:
        super().__init__(shape, dtype, storage)
        self.name = name
        self.layer = layer
        self.grad: Tensor | None = None
        self.sharded_grad: Tensor | None = None
        self.local_shape = shape
        self.stored_dtype = dtype
        self.needs_grad = trainable


class Node:
    """An operation of the graph. `edges` and `metadata` (shape, dtype) describe its inputs, `saved` what it keeps."""

    __slots__ = (
        "backward", "category", "edges", "extra", "layer", "leaves_first", "metadata", "path", "saved", "sequence",
    )  # fmt: skip

    sequence: int
    edges: list[tuple[Node | Parameter, int] | None]
    metadata: list[tuple[Shape, str]]
    saved: Saved | None
    backward: Callable[..., Gradients]
    extra: Any
    layer: int | None
    path: str
    category: str
    leaves_first: bool
    """Parameters get their gradients before the gradient of the input is passed on."""


class Saved:
    """Tensors that a node saved for its backward."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor | None]) -> None:
        self.tensors = tensors

    def unpack(self) -> list[Tensor | None]:
        return self.tensors
