"""
A shape-only PyTorch: tensors are shapes with reference counts, operations record autograd nodes, backward runs them.

Nothing is computed. A `Storage` writes an allocation when it is made and a free when Python drops its last reference,
which is when PyTorch's intrusive reference count drops too: a program written like the model's own `forward` has the
model's lifetimes. `engine.py` runs backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

from memplan.tape.backends import Target
from memplan.tape.hooks import Hooks, Units
from memplan.tape.tensors import ITEMSIZE, Gradients, Node, Parameter, Saved, Shape, Storage, Tensor

Attributes = list[tuple[int | None, Storage | None]]
"""By the block whose nodes keep them."""


class Graph:
    """
    Where operations write: the events so far, what each storage is, and the state of autograd.

    `group` and `layer` name the stretch of events being written (repeat.py folds equal stretches of equal layers).
    """

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self.events: list[int] = []
        self.sizes: list[int] = [0]
        self.info: list[tuple[str, str, str, str, Shape]] = [("", "", "", "", ())]
        self.streams: dict[int, int] = {}
        self.recorded: set[int] = set()
        self.waits: dict[int, int] = {}
        self.stretches: list[tuple[int, str, int | None]] = []
        self.group = ""
        self.layer: int | None = None
        self.path = ""
        self.category = "activations"
        self.stream = 0
        self.grad_enabled = True
        self.training = True
        """False in eval mode: no dropout."""
        self.autocast: str | None = None
        self.autocast_cache: dict[int, tuple[int | None, Tensor]] = {}
        self.save_hook: Callable[[list[Tensor | None]], Saved] = Saved
        self.sequence = 0
        self.workspaces: set[str] = set()
        self.workspace_bytes = 0
        self.bias_workspace_bytes = 0
        self.persistent: list[Any] = []
        self.in_backward = False
        self.units: Units | None = None
        self.on_gradient: Callable[[Parameter], None] | None = None
        """Runs when a parameter has its gradient, which the engine holds meanwhile (post_acc_grad_hooks)."""
        self.flat_gradients: int | None = None
        """
        The stream on which FSDP1 cuts flat parameters into views, where it shards nothing: backward of that runs there,
        and its result, a concatenation, is the gradient that stays (_flat_param.py, _use_unsharded_views).
        """
        self.attributes: Attributes = []
        """What nodes of the graph that is being made keep as attributes (`keep_until_graph_goes`)."""
        self.hooks: Hooks | None = None
        """Run around every module that has parameters of its own."""
        self.target = Target(device)
        """What chooses attention's kernel."""
        self.arrived: list[Parameter] = []
        """Parameters in the order in which the last backward pass has brought their gradients."""

    # -- stretches -----------------------------------------------------------------------------------------

    def enter(self, layer: int | None) -> None:
        """From here on events belong to this block (None: outside the blocks)."""
        if layer != self.layer:
            self.layer = layer
            self.stretches.append((len(self.events), self.group, layer))

    def leave_autocast(self) -> None:
        """Casts of weights live until autocast ends, unless the graph keeps them; dropped block by block."""
        if self.in_backward:
            self.autocast_cache.clear()  # a recomputation's: one block's casts
        if not self.autocast_cache:
            return
        outer_group, outer_layer = self.group, self.layer
        self.begin(f"autocast cache {len(self.stretches)}")
        cached, self.autocast_cache = self.autocast_cache, {}
        while cached:
            key = next(iter(cached))
            self.enter(cached[key][0])
            del cached[key]
        self.begin(f"{outer_group}'")
        self.enter(outer_layer)

    def begin(self, group: str) -> None:
        """A new group of stretches: part of a phase that visits each block at most once, in order or in reverse."""
        self.group = group
        self.layer = None
        self.stretches.append((len(self.events), group, None))

    # -- allocation ----------------------------------------------------------------------------------------

    def new(
        self, shape: Shape, dtype: str, name: str, category: str | None = None, transposed: bool = False
    ) -> Tensor:
        """A tensor in a new storage."""
        return Tensor(
            shape,
            dtype,
            self.storage(prod(shape) * ITEMSIZE[dtype], name, dtype, shape, category),
            transposed,
        )

    def storage(
        self, num_bytes: int, name: str, dtype: str = "uint8", shape: Shape = (), category: str | None = None
    ) -> Storage:
        """A new storage of so many bytes."""
        sizes = self.sizes
        storage_id = len(sizes)
        sizes.append(num_bytes)
        self.info.append((category or self.category, self.path, name, dtype, shape))
        if self.stream:
            self.streams[storage_id] = self.stream
        self.events.append(storage_id)
        return Storage(self.events, storage_id)

    @contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        """What is allocated inside belongs to this stream."""
        outer, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = outer

    def record_stream(self, storage: Storage) -> None:
        """Another stream than the storage's own uses it (`Tape.recorded`)."""
        self.recorded.add(storage.id)

    def wait(self, but_last_of: int = 0) -> None:
        """The host waits for the device (`Tape.waits`)."""
        marker = self.storage(0, "the host waits for the device", category="comm")
        self.waits[marker.id] = but_last_of

    def scratch(self, *num_bytes: int, name: str) -> None:
        """Memory that an operation takes and gives back inside itself, all of it at the same time."""
        held = [self.storage(size, name, category="workspace") for size in num_bytes if size]
        while held:
            held.pop()

    def claim_workspace(self, *, bias: bool = False) -> None:
        """
        cuBLAS keeps one workspace per handle and stream; the thread that runs backward has a handle of its own. Both
        are made at the thread's first product (backward's here as it begins). Products with a bias run in cuBLASLt,
        which may keep one more.
        """
        thread = "backward" if self.in_backward else "forward"
        self._keep(f"cuBLAS workspace ({thread})", self.workspace_bytes)
        if bias:
            self._keep(f"cuBLASLt workspace ({thread})", self.bias_workspace_bytes)

    def _keep(self, name: str, num_bytes: int) -> None:
        if num_bytes and name not in self.workspaces:
            self.workspaces.add(name)
            self.persistent.append(self.storage(num_bytes, name, category="workspace"))

    def claim_workspaces(self) -> None:
        """Those of both threads, for a process that has used cuBLAS before."""
        for self.in_backward in (True, False):
            self.claim_workspace(bias=not self.in_backward)

    def recategorize(self, tensor: Tensor, category: str, name: str) -> None:
        """A gradient that a parameter keeps was an activation's until now: name it for what it becomes."""
        assert tensor.storage is not None
        _, path, _, dtype, shape = self.info[tensor.storage.id]
        self.info[tensor.storage.id] = (category, path, name, dtype, shape)

    # -- autograd ------------------------------------------------------------------------------------------

    def record(
        self,
        output: Tensor,
        inputs: tuple[Tensor | None, ...],
        saved: Sequence[Tensor | None] | Saved,
        backward: Callable[..., Gradients],
        extra: Any = None,
    ) -> Node:
        """
        Make `output` the result of a node, where gradients are on; callers check `needs` first, where an input may need
        none.

        Autograd saves inputs before an operation runs and outputs after. Operations that save inputs call
        `save_hook` themselves before they allocate, since a recomputation ends at the last tensor saved.
        """
        node = Node()
        if not self.grad_enabled:
            return node
        node.sequence = self.sequence
        self.sequence += 1
        edges: list[tuple[Node | Parameter, int] | None] = []
        metadata: list[tuple[Shape, str]] = []
        for tensor in inputs:
            if tensor is None or not tensor.needs_grad:
                edges.append(None)
                metadata.append(((), ""))
            else:
                edges.append((tensor.node, tensor.slot) if tensor.node is not None else (tensor, 0))  # type: ignore[arg-type]
                metadata.append((tensor.shape, tensor.dtype))
        node.edges = edges
        node.metadata = metadata
        node.backward = backward
        node.extra = extra
        node.layer = self.layer
        node.path = self.path
        node.category = self.category
        node.leaves_first = False
        node.saved = saved if isinstance(saved, Saved) else self.save_hook(list(saved))
        output.node = node
        output.needs_grad = True
        return node

    def save(self, *tensors: Tensor | None) -> Saved:
        """Save inputs of an operation that is about to run."""
        return self.save_hook(list(tensors))

    def needs(self, *tensors: Tensor | None) -> bool:
        """Whether an operation on these tensors is recorded."""
        if not self.grad_enabled:
            return False
        return any(tensor is not None and tensor.needs_grad for tensor in tensors)

    def keep_until_graph_goes(self, tensor: Tensor) -> None:
        """
        A node has the tensor as an attribute, beside what it saves: no hook of checkpointing sees it, and it goes with
        the graph, not when the node has run.
        """
        self.attributes.append((self.layer, tensor.storage))

    def free_attributes(self, attributes: Attributes, label: str) -> None:
        """A graph goes that nodes with these are in, block by block."""
        if not attributes:
            return
        self.begin(f"graph freed {label}")
        while attributes:
            self.enter(attributes[-1][0])
            attributes.pop()
        self.enter(None)

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """As torch.no_grad()."""
        outer, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = outer

    @contextmanager
    def module(self, name: str) -> Iterator[None]:
        """Events inside are those of a submodule."""
        outer = self.path
        self.path = f"{outer}.{name}" if outer else name
        yield
        self.path = outer
