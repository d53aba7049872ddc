"""
Optimizer steps: the states that the first step creates, and the temporaries of every step.

Sources: torch/optim/adam.py, sgd.py, _adafactor.py; bitsandbytes/optim/optimizer.py.
"""

from __future__ import annotations

from math import prod

from memplan.job.spec import Job
from memplan.tape.engine import Graph, Parameter, Tensor
from memplan.tape.sharding import layout

SMALL_8BIT_ELEMENTS = 4096
"""bitsandbytes keeps float32 states for tensors below this."""
SMALL_PAGED_ELEMENTS = 100_000
"""bitsandbytes pages only states of tensors from this size on."""
NORM_CHUNK_ELEMENTS = 65536
"""Elements per partial sum of _foreach_norm (aten/src/ATen/native/cuda/ForeachReduceOp.cu)."""


class OptimizerProgram:
    """Runs the optimizer of a job over the trainable parameters, in a graph."""

    def __init__(self, g: Graph, job: Job, parameters: list[Parameter], num_elements: int) -> None:
        self.g = g
        self.job = job
        self.parameters = parameters
        self.num_elements = num_elements
        self.states: list[Tensor] = []
        self.on_host = layout(job).optimizer_on_host

    def step(self, number: int) -> None:
        """Step `number`: states where there are none yet, then the update."""
        g = self.g
        if self.job.train.max_grad_norm is not None:
            self._clip(number)
        if self.on_host:
            return
        if not self.states:
            self.create_states()
        outer, g.path = g.path, "optimizer"
        g.category = "workspace"
        self._update(number)
        g.category = "activations"
        g.path = outer

    def create_states(self) -> None:
        """What the first step creates, for every trained parameter."""
        g = self.g
        if self.on_host:
            return
        outer, g.path, g.category = g.path, "optimizer", "optimizer"
        g.begin("optimizer_states")
        for parameter in self.parameters:
            g.enter(parameter.layer)
            self._create(parameter)
        g.enter(None)
        g.path, g.category = outer, "activations"

    def zero_grad(self, number: int) -> None:
        """zero_grad(set_to_none=True)"""
        g = self.g
        g.begin(f"zero_grad {number}")
        for parameter in self.parameters:
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
        elif name == "lion":
            self._state(parameter, "state1", shape, "float32")
        elif name != "sgd":
            self._create_bitsandbytes(parameter, count)

    def _create_bitsandbytes(self, parameter: Parameter, count: int) -> None:
        """Adam of bitsandbytes: 8-bit states with a float32 constant per 256; paged ones in managed memory."""
        eight_bit = "8bit" in self.job.optimizer and count >= SMALL_8BIT_ELEMENTS
        paged = self.job.optimizer.startswith("paged") and count >= SMALL_PAGED_ELEMENTS
        for state in ("state1", "state2"):
            if not paged:
                self._state(parameter, state, parameter.local_shape, "uint8" if eight_bit else "float32")
        if eight_bit:
            for state in ("absmax1", "absmax2"):
                self._state(parameter, state, (-(-count // 256),), "float32")

    # -- update --------------------------------------------------------------------------------------------

    def _update(self, number: int) -> None:
        name, kernel = self.job.optimizer, self.job.optimizer_kernel
        if name == "adamw" and kernel == "foreach":
            self._update_foreach(number)
        elif name == "adamw" and kernel == "loop":
            self._update_loop(number)
        elif name == "adafactor":
            self._update_adafactor(number)

    def _update_foreach(self, number: int) -> None:
        """_multi_tensor_adam: one more tensor per parameter, for all parameters of a dtype at once."""
        g = self.g
        for dtype in dict.fromkeys(parameter.stored_dtype for parameter in self.parameters):
            group = [parameter for parameter in self.parameters if parameter.stored_dtype == dtype]
            g.begin(f"foreach {dtype} {number}")
            roots = []
            for parameter in group:
                g.enter(parameter.layer)
                roots.append(
                    g.new(parameter.local_shape, dtype, f"{parameter.name} sqrt of exp_avg_sq", "workspace")
                )
            g.begin(f"foreach {dtype} freed {number}")
            for parameter in reversed(group):  # a list lets go of its last item first
                g.enter(parameter.layer)
                roots.pop()
        g.enter(None)

    def _update_loop(self, number: int) -> None:
        """_single_tensor_adam: `denom` of one parameter lives until the next one's is made."""
        g = self.g
        g.begin(f"loop {number}")
        denominator: Tensor | None = None
        fresh: Tensor | None
        for parameter in self.parameters:
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

    def _update_adafactor(self, number: int) -> None:
        """
        _single_tensor_adafactor: an update of the parameter's size (a local that lives until the next parameter's),
        with row and column means on the way.
        """
        g = self.g
        g.begin(f"loop {number}")
        update: Tensor | None = None
        fresh: Tensor | None
        for parameter in self.parameters:
            g.enter(parameter.layer)
            fresh = g.new(
                parameter.local_shape, parameter.stored_dtype, f"{parameter.name} update", "workspace"
            )
            update, fresh = fresh, None
        g.enter(None)
        del update

    def _clip(self, number: int) -> None:
        """clip_grad_norm_: a scalar per gradient, and the kernel's partial sums."""
        g = self.g
        outer = g.category, g.path
        g.category, g.path = "workspace", "clip_grad_norm_"
        largest = max(prod(parameter.local_shape) for parameter in self.parameters)
        g.begin(f"clip {number}")
        partial = g.storage(
            self.num_elements * -(-largest // NORM_CHUNK_ELEMENTS) * 4, "partial sums of norms"
        )
        norms = []
        for parameter in self.parameters:
            g.enter(parameter.layer)
            norms.append(g.new((), parameter.stored_dtype, f"{parameter.name} norm of grad"))
        g.begin(f"clip freed {number}")
        del partial
        for parameter in reversed(self.parameters):
            g.enter(parameter.layer)
            norms.pop()
        g.enter(None)
        g.category, g.path = outer
