"""
When stage 3 of ZeRO gathers parameters and lets go of them (deepspeed/runtime/zero/parameter_offload.py,
partitioned_param_coordinator.py and partition_parameters.py of 0.19.8, whose functions are named below).

Every module that has parameters of its own fetches them before it runs, forward and backward, and releases them
afterwards. The first forward and backward pass is recorded. From the second on, a module also fetches what comes next,
and what is used again soon stays.

On CUDA parameters are gathered on a stream of their own, and their memory waits for the stream that has used them
before it can be given out again (`record_stream`). The tape frees it at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

from memplan.tape.graph import Graph
from memplan.tape.hooks import Key
from memplan.tape.modules import Module
from memplan.tape.scratch import zero3_fetched
from memplan.tape.sharded.sharding import GATHER_STREAM
from memplan.tape.tensors import ITEMSIZE, Gradients, Node, Parameter, Storage, Tensor

MAX_LIVE_PARAMETERS = 1_000_000_000
MAX_REUSE_DISTANCE = 1_000_000_000
"""DeepSpeed's defaults, in elements (runtime/zero/config.py)."""
NEVER = -1


@dataclass(eq=False)
class Handle:
    """AllGatherHandle and AllGatherCoalescedHandle: what is on its way; of several parameters in buffers."""

    parameters: list[Parameter]
    flat: list[Storage] = field(default_factory=list)
    is_complete: bool = False


@dataclass(eq=False)
class Status:
    """Of a parameter."""

    number: int
    """`ds_id`"""
    numel: int
    partition_numel: int
    shard: Storage | None = None
    """Of the partition, where it is a tensor of its own."""
    is_available: bool = False
    is_persistent: bool = False
    users: set[Module] = field(default_factory=set)
    """`ds_active_sub_modules`"""


class Coordinator:
    """
    PartitionedParameterCoordinator, with the hooks that call it.

    Args:
        parameters: of the model, in the order in which they were partitioned.
        degree: ranks that each of them is cut over.
        prefetch_elements: `stage3_prefetch_bucket_size`.
        persistence_threshold: elements up to which a parameter stays whole from step to step.
        on_host: partitions are in RAM, and are fetched before they are gathered.
    """

    def __init__(
        self,
        g: Graph,
        parameters: Sequence[Parameter],
        degree: int,
        *,
        prefetch_elements: int,
        persistence_threshold: int,
        on_host: bool = False,
    ) -> None:
        self.g = g
        self.degree = degree
        self.prefetch_elements = prefetch_elements
        self.on_host = on_host
        self.status: dict[Parameter, Status] = {}
        for number, parameter in enumerate(parameters):
            numel = prod(parameter.shape)
            self.status[parameter] = Status(
                number,
                numel,
                -(-numel // degree),
                parameter.storage,
                is_persistent=numel <= persistence_threshold,
            )
            parameter.storage = None
        self.modules: dict[Key, Module] = {}
        self.inflight: dict[Parameter, Handle] = {}
        self.active: dict[Module, None] = {}
        """Modules whose backward has begun and not ended, in that order."""
        self.mode = "invalid"
        """ZeRoTraceMode: `invalid`, `record` or `complete`."""
        self.order: list[Module] = []
        self.position = 0
        self.queue: deque[tuple[Parameter, int]] = deque()
        self.fetched_for: dict[Parameter, int] = {}
        """Per parameter, the last use that it has been fetched for, as a position in `order`."""
        self.num_available = 0
        self.releasable: dict[tuple[Module, int], set[Parameter]] = {}

    # -- hooks of modules ----------------------------------------------------------------------------------

    def run(
        self,
        key: Key,
        parameters: Sequence[Parameter],
        inputs: Sequence[Tensor | None],
        forward: Callable[..., Tensor],
    ) -> Tensor:
        """_register_deepspeed_module: `forward(*inputs)` between the hooks of the module that is called `key`."""
        module = self.modules.setdefault(key, Module(tuple(dict.fromkeys(parameters))))
        self._begin(module)
        self._fetch(module, forward=True)
        module.num_inputs = 0
        out = forward(*(self._after_backward_of(module, x) for x in inputs))
        return self.leave(key, out)

    def enter(self, key: Key, x: Tensor | None = None) -> Tensor | None:
        """The same of a module without parameters, which has others fetched ahead, and of its input."""
        module = self.modules.setdefault(key, Module(()))
        self._begin(module)
        self._fetch(module, forward=True)
        module.num_inputs = 0
        return self._after_backward_of(module, x)

    def leave(self, key: Key, out: Tensor) -> Tensor:
        module = self.modules[key]
        self._release(module, forward=True)
        return self._before_backward_of(module, out)

    def touch(self, key: Key, parameter: Parameter) -> None:
        """
        ZeROOrderedDict: a module's code reads another's parameter, which becomes one of its own if it is not there
        (register_external_parameter).
        """
        status = self.status[parameter]
        if status.is_available or parameter in self.inflight or self.g.in_backward:
            return
        module = self.modules[key]
        module.parameters = (*module.parameters, parameter)
        parameter.storage = self._whole(parameter, status.partition_numel * self.degree)
        status.is_available = True

    def _begin(self, module: Module) -> None:
        """trace_prologue, record_module"""
        expected = self.order[self.position] if self.position < len(self.order) else None
        if self.mode == "complete" and module is not expected:
            self.mode = "invalid"
            self.order, self.queue, self.fetched_for = [], deque(), {}
            self._clear_inflight()
        if self.mode == "record":
            self.order.append(module)

    def _after_backward_of(self, module: Module, x: Tensor | None) -> Tensor | None:
        """PostBackwardFunctionModule: a node on every input that requires a gradient."""
        if x is None or not self.g.needs(x):
            return x
        module.num_inputs += 1
        return self._passed_on(x, module, self._after_backward)

    def _before_backward_of(self, module: Module, out: Tensor) -> Tensor:
        """PreBackwardFunctionForModule: a node on the output."""
        return self._passed_on(out, module, self._before_backward) if self.g.needs(out) else out

    def _passed_on(self, x: Tensor, module: Module, backward: Callable[..., Gradients]) -> Tensor:
        """The same memory behind one more node, which passes its gradient on."""
        seen = Tensor(x.shape, x.dtype, x.storage, x.transposed)
        seen.view, seen.columns = x.view, x.columns
        self.g.record(seen, (x,), [], backward, module)
        return seen

    def _before_backward(
        self, g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
    ) -> Gradients:
        self._begin(node.extra)
        self.active[node.extra] = None
        self._fetch(node.extra, forward=False)
        return [gradients[0]]

    def _after_backward(
        self, g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
    ) -> Gradients:
        node.extra.num_inputs -= 1
        if node.extra.num_inputs == 0:
            self._release(node.extra, forward=False)
        return [gradients[0]]

    # -- the pass ------------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """reset_step, before the model's forward."""
        self._clear_inflight()
        if self.mode == "record":
            self.mode = "complete"
        elif self.mode == "invalid":
            self.mode, self.order = "record", []
        self.queue.clear()
        if self.mode == "complete":
            self.queue.extend(
                (parameter, index)
                for index, module in enumerate(self.order)
                for parameter in self._sorted(module.parameters)
            )
        self.fetched_for.clear()
        self.position = self.num_available = 0

    def end_backward(self) -> None:
        """release_backward_leftovers: of modules whose input needed no gradient."""
        while self.active:
            module, _ = self.active.popitem()
            for parameter in dict.fromkeys((*module.parameters, *module.adopted)):
                status = self.status[parameter]
                status.users.discard(module)
                if not status.is_persistent:
                    self._partition(parameter)
            module.adopted.clear()

    def release_all(self) -> None:
        """release_and_reset_all, as the optimizer's step begins."""
        for parameter, status in self.status.items():
            handle = self.inflight.pop(parameter, None)
            if handle is not None:
                self._wait(handle)
            del handle
            status.users.clear()
            self._partition(parameter)

    def gather_persistent(self) -> None:
        """_post_step, _allgather_params_coalesced: each in memory of its own, from here to the next step."""
        for parameter, status in self.status.items():
            if status.is_persistent:
                parameter.storage = self._whole(parameter, status.partition_numel * self.degree)
                status.is_available = True

    # -- fetching ------------------------------------------------------------------------------------------

    def _fetch(self, module: Module, *, forward: bool) -> None:
        """fetch_sub_module"""
        self._gather(module.parameters)
        owner = next(reversed(self.active)) if forward and self.g.in_backward and self.active else None
        for parameter in module.parameters:
            users = self.status[parameter].users
            users.add(module)
            if owner is not None and not parameter.needs_grad:
                owner.adopted[parameter] = None
                users.add(owner)
            if parameter in self.inflight:
                handle = self.inflight.pop(parameter)
                self._wait(handle)
                del handle
        if self.mode == "complete":
            self._prefetch(module)
        self.position += 1

    def _prefetch(self, module: Module) -> None:
        last, position = self.fetched_for, self.position
        fresh = [parameter for parameter in module.parameters if last.get(parameter, NEVER) < position]
        found: set[Parameter] = set()
        while self.queue and len(found) < len(fresh):
            parameter, index = self.queue.popleft()
            last[parameter] = index
            found.add(parameter)
        room = min(MAX_LIVE_PARAMETERS - self.num_available, self.prefetch_elements)
        wanted: dict[Parameter, None] = {}
        count = 0
        while self.queue and count < room:
            parameter, index = self.queue.popleft()
            last[parameter] = max(last.get(parameter, NEVER), index)
            if self._is_away(parameter) and parameter not in wanted:
                wanted[parameter] = None
                count += self.status[parameter].numel
        self._gather(tuple(wanted))

    def _is_away(self, parameter: Parameter) -> bool:
        return not self.status[parameter].is_available and parameter not in self.inflight

    def _gather(self, parameters: Sequence[Parameter]) -> None:
        """
        all_gather_coalesced: one parameter is gathered where it stays, several into one buffer per dtype, of which each
        is a copy once they are waited for.
        """
        away = self._sorted([parameter for parameter in parameters if self._is_away(parameter)])
        if not away:
            return
        self.num_available += sum(self.status[parameter].numel for parameter in away)
        away.sort(key=lambda parameter: parameter.dtype)  # sort_dtypes, which here is the same
        handle = Handle(away)
        with self.g.on_stream(GATHER_STREAM):
            for dtype in dict.fromkeys(parameter.dtype for parameter in away):
                parts = [self.status[item].partition_numel for item in away if item.dtype == dtype]
                if len(away) == 1:
                    away[0].storage = self._whole(away[0], parts[0] * self.degree)
                else:
                    num_bytes = sum(parts) * self.degree * ITEMSIZE[dtype]
                    handle.flat.append(
                        self.g.storage(num_bytes, "parameters gathered together", category="comm")
                    )
                if self.on_host:
                    sizes = zero3_fetched(parts, ITEMSIZE[dtype])
                    self.g.scratch(*sizes, name="partitions fetched from the host")
        self.inflight |= dict.fromkeys(away, handle)

    def _wait(self, handle: Handle) -> None:
        if handle.is_complete:
            return
        handle.is_complete = True
        for parameter in handle.parameters:
            if handle.flat:
                with self.g.on_stream(GATHER_STREAM):
                    parameter.storage = self._whole(parameter, self.status[parameter].numel)
            self.status[parameter].is_available = True

    def _whole(self, parameter: Parameter, count: int) -> Storage:
        name = f"{parameter.name} gathered"
        num_bytes = count * ITEMSIZE[parameter.dtype]
        return self.g.storage(num_bytes, name, parameter.dtype, parameter.shape, "comm")

    def _sorted(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        return sorted(parameters, key=lambda parameter: self.status[parameter].number)

    # -- releasing -----------------------------------------------------------------------------------------

    def _release(self, module: Module, *, forward: bool) -> None:
        """release_sub_module"""
        going = self._releasable(module) if self.mode == "complete" else set(module.parameters)
        parameters = dict.fromkeys(module.parameters)
        if not forward:
            parameters |= module.adopted
            going |= {parameter for parameter in module.adopted if not self.status[parameter].is_persistent}
            module.adopted.clear()
            self.active.pop(module, None)
        for parameter in parameters:
            self.status[parameter].users.discard(module)
            if parameter in going:
                self._partition(parameter)

    def _releasable(self, module: Module) -> set[Parameter]:
        """__params_to_release, which remembers its first answer: not what was fetched for later, nor what is near."""
        key = module, self.position
        if key not in self.releasable:
            going = {
                parameter
                for parameter in module.parameters
                if not self.status[parameter].is_persistent
                and self.fetched_for.get(parameter, NEVER) <= self.position
            }
            distance = 0
            for following in self.order[self.position :]:
                if not going or distance >= MAX_REUSE_DISTANCE:
                    break
                going.difference_update(following.parameters)
                distance += sum(self.status[parameter].numel for parameter in following.parameters)
            self.releasable[key] = going
        return set(self.releasable[key])

    def _partition(self, parameter: Parameter) -> None:
        """__release_param, free_param"""
        status = self.status[parameter]
        if status.is_available and not status.users:
            parameter.storage = None
            status.is_available = False
            self.num_available -= status.numel

    def _clear_inflight(self) -> None:
        """_clean_inflight_param_registry"""
        for parameter, handle in self.inflight.items():
            self._wait(handle)
            self._partition(parameter)
        self.inflight.clear()
