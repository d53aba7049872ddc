"""
Optimizer steps: the states that the first step creates, and the temporaries of every step.

Sources: torch/optim/adam.py, sgd.py, _adafactor.py; bitsandbytes/optim/optimizer.py; torchao's are in low_bit.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

from memplan.job.spec import Job
from memplan.tape.graph import Graph
from memplan.tape.loss import Locals
from memplan.tape.low_bit import LOW_BIT, Buffer, state_buffers, step_buffers
from memplan.tape.packing import DYNAMIC_MAP_BYTES
from memplan.tape.scratch import adafactor, foreach_norm
from memplan.tape.sharded.sharding import SHARDED, layout
from memplan.tape.tensors import ITEMSIZE, Parameter, Tensor

SMALL_8BIT_ELEMENTS = 4096
"""bitsandbytes keeps float32 states for tensors below this."""
SMALL_PAGED_ELEMENTS = 100_000
"""bitsandbytes pages only states of tensors from this size on."""


def parameter_groups(job: Job, parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """
    Parameters as the trainers group them: with weight decay, and in transformers' Trainer always, matrices and vectors
    (train/optimizer.py; trainer.py, create_optimizer).
    """
    if not job.train.weight_decay and job.loop != "hf_trainer":
        return [list(parameters)]
    matrices = [parameter for parameter in parameters if len(parameter.shape) > 1]
    vectors = [parameter for parameter in parameters if len(parameter.shape) <= 1]
    return [group for group in (matrices, vectors) if group]


def _by_dtype(g: Graph, parameters: Sequence[Parameter]) -> dict[str, list[Parameter]]:
    """
    As torch groups tensors for its foreach kernels: in an unordered map, of which libstdc++ shows what was added last
    first (ATen/native/ForeachUtils.h, _group_tensors_by_first_tensors_device_and_dtype); before 2.1 in a dictionary
    (torch/utils/_foreach_utils.py).
    """
    dtypes = list(dict.fromkeys(parameter.stored_dtype for parameter in parameters))
    if g.target.torch >= (2, 1):
        dtypes.reverse()
    return {
        dtype: [parameter for parameter in parameters if parameter.stored_dtype == dtype] for dtype in dtypes
    }


class OptimizerProgram:
    """Runs the optimizer of a job over the trainable parameters, in a graph."""

    def __init__(
        self,
        g: Graph,
        job: Job,
        parameters: list[Parameter],
        num_elements: int,
        embeddings: Collection[str] = (),
    ) -> None:
        self.g = g
        self.job = job
        self.parameters = parameters
        self.num_elements = num_elements
        self.embeddings = embeddings
        self.states: list[Tensor] = []
        self.kept_norm: Tensor | None = None
        self.has_states = False
        self.has_maps = False
        """Of bitsandbytes, which makes them when it first needs them: those of 8-bit states."""
        self.on_host = layout(job, g.device).optimizer_on_host
        self.is_low_bit = job.optimizer in LOW_BIT
        self.in_trainer = job.loop == "hf_trainer"
        """
        transformers' Trainer takes the norm of the gradients whether it clips or not, has matrices and vectors in two
        groups with or without weight decay, and keeps the states of embeddings in 32 bits where others have 8
        (trainer.py, _get_grad_norm and create_optimizer).
        """
        sharded = self.in_trainer and job.parallel.strategy in SHARDED
        self.widens_gradients = g.device == "cpu" and sharded and job.parallel.fsdp_version == 1
        """
        FSDP1 takes norms in float32 (fully_sharded_data_parallel.py, _get_grad_norm). The kernel for a GPU reads 16
        bits as they are; the CPU's is given a copy (ATen/native/ReduceOpsUtils.h, make_reduction).
        """

    def step(self, number: int) -> None:
        """Step `number`: states where there are none yet, then the update."""
        has_shards_on_host = self.job.offload.params and self.job.method != "npt"
        if (self.in_trainer or self.job.train.max_grad_norm is not None) and not has_shards_on_host:
            self._clip(number)
        self.update(number)

    def update(self, number: int) -> None:
        """A step without the norm of the gradients."""
        g = self.g
        if self.on_host:
            return
        creates = not self.has_states
        for index, group in enumerate(self._groups()):
            if creates and not self.is_low_bit:
                self._create_states(index, group)
            outer, g.path, g.category = g.path, "optimizer", "workspace"
            self._update(group, f"{index} {number}" if index else f"{number}")
            g.category, g.path = "activations", outer
        self.has_states = True

    def create_states(self) -> None:
        """What the first step creates, for every trained parameter."""
        if not self.on_host:
            for index, group in enumerate(self._groups()):
                self._create_states(index, group)
        self.has_states = True

    def _create_states(self, index: int, parameters: list[Parameter]) -> None:
        g = self.g
        outer, g.path, g.category = g.path, "optimizer", "optimizer"
        g.begin(f"optimizer_states {index}")
        for parameter in parameters:
            g.enter(parameter.layer)
            self._create(parameter)
        g.enter(None)
        g.path, g.category = outer, "activations"

    def zero_grad(self, number: int) -> None:
        """zero_grad(set_to_none=True)"""
        g = self.g
        g.begin(f"zero_grad {number}")
        for index, group in enumerate(self._groups()):
            if index:
                g.begin(f"zero_grad {index} {number}")
            for parameter in group:
                g.enter(parameter.layer)
                parameter.grad = parameter.sharded_grad = None
        g.enter(None)

    # -- states --------------------------------------------------------------------------------------------

    def _state(self, parameter: Parameter, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self.states.append(self.g.new(shape, dtype, f"{parameter.name} {name}", "optimizer"))

    def _create(self, parameter: Parameter) -> None:
        name, shape, dtype = self.job.optimizer, parameter.local_shape, parameter.stored_dtype
        count = prod(shape)
        if name == "adamw":
            if self.job.optimizer_kernel == "fused":
                self._state(parameter, "step", (), "float32")
            self._state(parameter, "exp_avg", shape, dtype)
            self._state(parameter, "exp_avg_sq", shape, dtype)
        elif name == "adafactor":
            if len(shape) > 1:
                self._state(parameter, "row_var", (*shape[:-1], 1), dtype)
                self._state(parameter, "col_var", (*shape[:-2], 1, shape[-1]), dtype)
            else:
                self._state(parameter, "variance", shape, dtype)
        elif self.is_low_bit:
            for buffer in state_buffers(name, shape, dtype):
                self._state(parameter, buffer.name, buffer.shape, buffer.dtype)
        elif name == "lion":
            self._state(parameter, "state1", shape, "float32")
        elif name != "sgd":
            self._create_bitsandbytes(parameter, count)

    def _create_bitsandbytes(self, parameter: Parameter, count: int) -> None:
        """Adam of bitsandbytes: 8-bit states with a float32 constant per 256; paged ones in managed memory."""
        eight_bit = "8bit" in self.job.optimizer and count >= SMALL_8BIT_ELEMENTS
        if self.in_trainer and parameter.name in self.embeddings:
            eight_bit = False
        paged = self.job.optimizer.startswith("paged") and count >= SMALL_PAGED_ELEMENTS
        if eight_bit and not self.has_maps:
            self.has_maps = True
            for kind in ("dynamic", "udynamic"):
                self.g.persistent.append(
                    self.g.storage(DYNAMIC_MAP_BYTES, f"bitsandbytes' {kind} map", category="optimizer")
                )
        for state in ("state1", "state2"):
            if not paged:
                self._state(parameter, state, parameter.local_shape, "uint8" if eight_bit else "float32")
        if eight_bit:
            for state in ("absmax1", "absmax2"):
                self._state(parameter, state, (-(-count // 256),), "float32")

    # -- update --------------------------------------------------------------------------------------------

    def _update(self, group: list[Parameter], label: str) -> None:
        name, kernel = self.job.optimizer, self.job.optimizer_kernel
        if name in ("adamw", "adafactor") and kernel == "foreach":
            self._update_foreach(group, label)
        elif name == "adamw" and kernel == "loop":
            self._update_loop(group, label)
        elif name == "adafactor":
            self._update_adafactor(group, label)
        elif self.is_low_bit:
            self._update_low_bit(group, label)

    def _groups(self) -> list[list[Parameter]]:
        return parameter_groups(self.job, self.parameters)

    def _update_foreach(self, parameters: list[Parameter], number: str) -> None:
        """_multi_tensor_adam: one more tensor per parameter, for all parameters of a group and dtype at once."""
        g = self.g
        roots: list[tuple[Parameter, Tensor]] = []
        for dtype, group in [*_by_dtype(g, parameters).items(), ("", [])]:
            before = roots  # a local of the loop, until those of the next dtype are there
            g.begin(f"foreach {dtype} {number}")
            roots = []
            for parameter in group:
                g.enter(parameter.layer)
                name = f"{parameter.name} sqrt of exp_avg_sq"
                roots.append((parameter, g.new(parameter.local_shape, dtype, name, "workspace")))
            g.begin(f"foreach freed before {dtype} {number}")
            while before:  # a list lets go of its last item first
                g.enter(before[-1][0].layer)
                before.pop()
        g.enter(None)

    def _update_loop(self, parameters: list[Parameter], number: str) -> None:
        """_single_tensor_adam: `denom` of one parameter lives until the next one's is made."""
        g = self.g
        g.begin(f"loop {number}")
        denominator: Tensor | None = None
        fresh: Tensor | None
        for parameter in parameters:
            g.enter(parameter.layer)
            root = g.new(
                parameter.local_shape,
                parameter.stored_dtype,
                f"{parameter.name} sqrt of exp_avg_sq",
                "workspace",
            )
            fresh = g.new(
                parameter.local_shape, parameter.stored_dtype, f"{parameter.name} denominator", "workspace"
            )
            del root
            denominator, fresh = fresh, None
        g.enter(None)
        del denominator

    def _update_adafactor(self, parameters: list[Parameter], number: str) -> None:
        """
        _single_tensor_adafactor: an update of the parameter's size, from means of rows and columns, and the norms of
        both on the way. Locals of one parameter live until the next one's take their names.
        """
        g = self.g
        g.begin(f"loop {number}")
        kept = Locals()
        for parameter in parameters:
            g.enter(parameter.layer)
            name, shape, dtype = parameter.name, parameter.local_shape, parameter.stored_dtype
            scalar = ITEMSIZE[dtype]
            g.scratch(*adafactor(scalar), name="norm of parameter")
            if len(shape) > 1:
                rows, columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
                kept["rows"] = g.new(rows, dtype, f"{name} mean squares of rows", "workspace")
                kept["columns"] = g.new(columns, dtype, f"{name} mean squares of columns", "workspace")
            else:
                kept["squares"] = g.new(shape, dtype, f"{name} squares of grad", "workspace")
            kept["estimate"] = g.new(shape, dtype, f"{name} update", "workspace")
            if len(shape) > 1:
                g.scratch(*adafactor(scalar, prod(shape[:-2])), name="mean of rows")
            kept["update"] = kept["estimate"]
            g.scratch(*adafactor(scalar), name="norm of update")
        g.enter(None)
        kept.clear()

    def _update_low_bit(self, parameters: list[Parameter], number: str) -> None:
        """Parameter by parameter: states where there are none yet, then the buffers of its compiled step."""
        g = self.g
        g.begin(f"loop {number}")
        held: dict[str, Tensor] = {}
        for parameter in parameters:
            g.enter(parameter.layer)
            if not self.has_states:
                self._create(parameter)
            shape = parameter.local_shape
            for item in step_buffers(self.job.optimizer, shape, g.target.multiprocessors):
                if isinstance(item, Buffer):
                    name = f"{parameter.name} {item.name}"
                    held[item.name] = g.new(item.shape, item.dtype, name, "workspace")
                else:
                    del held[item]
        g.enter(None)

    def _clip(self, number: int) -> None:
        """clip_grad_norm_: a scalar per gradient, with the kernel's partial sums, their norm, and a factor from it."""
        g = self.g
        outer = g.category, g.path
        g.category, g.path = "workspace", "clip_grad_norm_"
        g.begin(f"norm of the step before {number}")
        self.kept_norm = None
        total = self._total_norm(number)
        dtype = total.dtype
        denominator = g.new((), dtype, "norm plus epsilon")
        reciprocal = g.new((), dtype, "reciprocal")
        factor = g.new((), dtype, "factor")
        del reciprocal, denominator
        clamped = g.new((), dtype, "factor of at most 1")
        if self.in_trainer:
            self.kept_norm = total  # for its log
        del factor, clamped, total
        g.category, g.path = outer

    def _total_norm(self, number: int) -> Tensor:
        g = self.g
        groups = _by_dtype(g, self.parameters)
        norms = []
        for index, (dtype, group) in enumerate(groups.items()):
            largest = max(prod(parameter.local_shape) for parameter in group)
            g.begin(f"clip {index} {number}")
            partial = [
                g.storage(size, "partial sums of norms")
                for size in foreach_norm(self._num_in_model(group), largest)
            ]
            for parameter in group:
                g.enter(parameter.layer)
                if self.widens_gradients and dtype != "float32":
                    g.scratch(prod(parameter.local_shape) * 4, name=f"{parameter.name} grad in float32")
                norms.append(g.new((), dtype, f"{parameter.name} norm of grad"))
            g.begin(f"clip freed {index} {number}")
            partial.clear()
        dtype = next(iter(groups)) if len(groups) == 1 else "float32"
        stacked = g.new((self.num_elements,), dtype, "norms")
        total = g.new((), dtype, "norm of all gradients")
        del stacked
        for index, group in reversed(list(enumerate(groups.values()))):
            if index < len(groups) - 1:
                g.begin(f"clip stacked {index} {number}")
            for parameter in reversed(group):
                g.enter(parameter.layer)
                norms.pop()
        g.enter(None)
        return total

    def _num_in_model(self, group: list[Parameter]) -> int:
        """How many tensors of the whole model a group of those at hand stands for."""
        outside = sum(parameter.layer is None for parameter in self.parameters)
        inside = len(self.parameters) - outside
        at_hand = sum(parameter.layer is not None for parameter in group)
        of_model = (self.num_elements - outside) * at_hand // inside if inside else 0
        return len(group) - at_hand + of_model
