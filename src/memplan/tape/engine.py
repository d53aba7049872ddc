"""
The autograd engine of the shape-only PyTorch, as torch/csrc/autograd/engine.cpp: nodes run in the order of their
sequence numbers, a node's input gradients live until it has returned, its saved tensors until its outputs have been
validated, and gradients that meet are added in place when the first of them has a single owner.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from math import prod
from sys import getrefcount

from memplan.tape.graph import Graph
from memplan.tape.scratch import column_sum
from memplan.tape.tensors import ITEMSIZE, Gradients, Node, Parameter, Saved, Shape, Storage, Tensor


def backward(g: Graph, loss: Tensor) -> None:
    """Run the graph that ends in `loss`, a scalar."""
    outer_path, outer_category, outer_layer, outer_grad = (
        g.path,
        g.category,
        g.layer,
        g.grad_enabled,
    )
    g.grad_enabled, g.in_backward = False, True
    root = loss.node
    assert root is not None
    g.arrived.clear()
    g.enter(root.layer)
    g.category = root.category
    ones = g.new((), loss.dtype, "grad of loss")  # the caller of the engine holds it until all is done
    if root.layer is None:
        g.claim_workspace()
    buffers: dict[Node | Parameter, dict[int, Tensor]] = {root: {0: ones}}
    visited = root.layer
    if g.units is not None:
        g.units.visit_backward(visited)
    visited = _run_from(g, root, buffers)
    if g.units is not None:
        g.units.leave_backward(visited)
        g.units.end_backward()
    g.in_backward = False
    g.path, g.category, g.grad_enabled = outer_path, outer_category, outer_grad
    g.enter(outer_layer)
    del ones


def _run_from(g: Graph, root: Node, buffers: dict[Node | Parameter, dict[int, Tensor]]) -> int | None:
    """Run the graph that ends in `root`, whose gradients are in `buffers`; returns the block visited last."""
    dependencies = _count_dependencies(root)
    ready = [(-root.sequence, 0, root)]
    complete: list[Parameter] = []
    visited = root.layer
    while ready:
        node = heappop(ready)[2]
        if g.units is not None and node.layer != visited:
            g.units.leave_backward(visited)
            visited = node.layer
            g.enter(visited)
            g.units.visit_backward(visited)
        g.enter(node.layer)
        g.path, g.category = node.path, node.category
        outputs = _run(g, node, buffers.pop(node))
        for position in _order(node):
            output, outputs[position] = outputs[position], None
            edge = node.edges[position]
            if edge is None:
                continue
            target, slot = edge
            if output is not None:
                held = buffers.setdefault(target, {})
                previous = held.pop(slot, None)
                if previous is not None:
                    total = _accumulate(g, previous, output)
                    previous = None  # before the gradient that arrived
                    output = total
                    del total
                held[slot] = output
                output = None
            dependencies[target] -= 1
            if dependencies[target]:
                continue
            if isinstance(target, Node):
                heappush(ready, (-target.sequence, 0, target))
            elif node.leaves_first:
                _complete(g, target, buffers)
            else:
                complete.append(target)
        node.edges = []
        for parameter in complete:  # before all other nodes
            _complete(g, parameter, buffers)
        complete.clear()
    return visited


def _complete(g: Graph, parameter: Parameter, buffers: dict[Node | Parameter, dict[int, Tensor]]) -> None:
    gradients = buffers.pop(parameter, None)
    if gradients is not None:
        gradient = gradients.pop(0)
        _accumulate_parameter(g, parameter, gradient)
        if g.on_gradient is not None and parameter.name:
            g.on_gradient(parameter)


def backward_from(g: Graph, output: Tensor, gradient: Tensor) -> None:
    """A backward inside a backward, as reentrant checkpointing runs it; the caller keeps both arguments."""
    assert output.node is not None
    _run_from(g, output.node, {output.node: {output.slot: gradient}})


def _run(g: Graph, node: Node, gradients: dict[int, Tensor]) -> Gradients:
    saved = node.saved
    assert saved is not None
    tensors = saved.unpack()
    outputs = node.backward(g, node, gradients, tensors)
    if type(saved) is not Saved:
        tensors.reverse()  # locals of the node's function, gone in the order opposite to that of what it saved
        del tensors
    for position, output in enumerate(outputs):
        if output is None or node.edges[position] is None:
            continue
        shape, dtype = node.metadata[position]
        outputs[position] = None
        if output.shape != shape:
            output = _summed(g, output, shape)
        if output.dtype != dtype:
            columns = output.columns
            output = g.new(shape, dtype, "cast of grad", transposed=output.transposed)
            output.columns = columns
        outputs[position] = output
        output = None
    for slot in sorted(gradients):
        del gradients[slot]
    node.saved = None
    return outputs


def _summed(g: Graph, gradient: Tensor, shape: Shape) -> Tensor:
    """The gradient of what was broadcast (`at::sum_to`)."""
    out = g.new(shape, gradient.dtype, "sum of grad")
    is_matrix = gradient.shape[len(gradient.shape) - len(shape) :] == shape
    if g.device == "cuda" and is_matrix and not gradient.transposed and not gradient.columns:
        columns = prod(shape)
        rows = prod(gradient.shape) // columns
        parts = column_sum(rows, columns, ITEMSIZE[gradient.dtype], g.target.multiprocessors)
        g.scratch(*parts, name="parts of the sum")
    return out


def _accumulate(g: Graph, previous: Tensor, output: Tensor) -> Tensor:
    """Two gradients of one tensor: added to the first in place where it has no other owner, never to the second."""
    if not previous.view and _held_once(previous):
        return previous
    return g.new(previous.shape, previous.dtype, "sum of grads", transposed=previous.transposed)


def _accumulate_parameter(g: Graph, parameter: Parameter, gradient: Tensor) -> None:
    """AccumulateGrad, when the gradients of all uses of the parameter have met."""
    if parameter.name:
        g.arrived.append(parameter)
    if parameter.grad is not None:
        return
    if not parameter.name:  # a block's input, cut off its graph
        parameter.grad = gradient
        return
    if g.flat_gradients is not None:
        assert gradient.storage is not None
        g.record_stream(gradient.storage)  # the engine does that, input_buffer.cpp
        with g.on_stream(g.flat_gradients):
            gradient = g.new(gradient.shape, gradient.dtype, "grad")
    elif not _held_once(gradient):
        gradient = g.new(gradient.shape, gradient.dtype, "grad")
    g.recategorize(gradient, "gradients", f"{parameter.name} grad")
    parameter.grad = gradient


def _order(node: Node) -> Iterable[int]:
    """The order in which a node's outputs are passed on."""
    positions = range(len(node.edges))
    if not node.leaves_first:
        return positions
    leaves = {
        position
        for position, edge in enumerate(node.edges)
        if edge is not None and isinstance(edge[0], Parameter)
    }
    return [*sorted(leaves), *(position for position in positions if position not in leaves)]


def _held_once(tensor: Tensor) -> bool:
    """Whether a gradient in the engine's hands (a local of the caller's caller, handed down) has no other owner."""
    tensor_references, storage_references = _SOLE
    return getrefcount(tensor) <= tensor_references and getrefcount(tensor.storage) <= storage_references


def _calibrate() -> tuple[int, int]:
    """The reference counts that `_held_once` sees for a single owner: they differ between Python versions."""

    def caller(tensor: Tensor) -> tuple[int, int]:
        def callee(held: Tensor) -> tuple[int, int]:
            return getrefcount(held), getrefcount(held.storage)

        return callee(tensor)

    local = Tensor((1,), "bool", Storage([], 0))
    return caller(local)


_SOLE = _calibrate()


def _count_dependencies(root: Node) -> dict[Node | Parameter, int]:
    """How many edges of the graph under `root` lead to each node and leaf."""
    counts: dict[Node | Parameter, int] = {root: 0}
    stack = [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            target = edge[0]
            if target in counts:
                counts[target] += 1
                continue
            counts[target] = 1
            if isinstance(target, Node):
                stack.append(target)
    return counts
