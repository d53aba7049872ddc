"""
Stage 3 of DeepSpeed's ZeRO: every parameter cut over the ranks by itself, its parts in one flat tensor, gradients
reduced bucket by bucket into another, and the optimizer's step over flat groups of parts
(deepspeed/runtime/zero/stage3.py of 0.19.8, whose functions are named below; zero3_gather.py has the parameters).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from memplan.job.spec import Job
from memplan.tape import scratch
from memplan.tape.graph import Graph
from memplan.tape.optimizer import OptimizerProgram, parameter_groups
from memplan.tape.sharded.sharding import REDUCE_STREAM
from memplan.tape.sharded.zero3_gather import Coordinator
from memplan.tape.sharded.zero_groups import persistence_threshold, prefetch_elements, reduce_bucket_elements
from memplan.tape.tensors import ITEMSIZE, Parameter, Storage, Tensor

SUB_GROUP_ELEMENTS = 1_000_000_000
"""`sub_group_size`, DeepSpeed's default: the step goes over the parts in stretches of so many elements."""


class Zero3Optimizer:
    """
    DeepSpeedZeroOptimizer_Stage3 of any rank, for all parts are padded to one size: hooks of the model's modules and of
    its backward pass (`Units`), and the step.

    Args:
        parameters: of the whole model, each holding its part of this rank.
    """

    def __init__(
        self,
        g: Graph,
        job: Job,
        parameters: Sequence[Parameter],
        trainable: Sequence[Parameter],
        hidden_size: int,
    ) -> None:
        self.g = g
        self.degree = job.parallel.dp_shard
        self.on_host = job.offload.optimizer or job.offload.params
        self.params_on_host = job.offload.params
        self.is_last = True
        self.casts_inputs = False
        self.bucket_elements = reduce_bucket_elements(hidden_size)
        self.coordinator = g.hooks = Coordinator(
            g,
            parameters,
            self.degree,
            prefetch_elements=prefetch_elements(hidden_size),
            persistence_threshold=persistence_threshold(hidden_size),
            on_host=job.offload.params,
        )
        self.groups = [part for group in parameter_groups(job, trainable) for part in self._sub_groups(group)]
        self.dtype = job.dtype
        """`communication_data_type`, `gradient_accumulation_dtype`: of the bucket, and of gradients from then on."""
        self.held_dtype = trainable[0].dtype
        """Of the parameters that train."""
        self.pending: list[Parameter] = []
        """Parameters whose gradients wait in the bucket, or are alone too large for it."""
        self.elements = 0
        self.is_first = True
        """Whether gradients are copied to their places, and not added."""
        self.programs: list[OptimizerProgram] = []
        self.flat: Storage | None = None
        """`lp_param_buffer`: the parts of all parameters that train."""
        self._load(job)
        self.bucket = self._buffer(self.bucket_elements, "bucket of gradients", "comm", self.dtype)
        self.gradients = None
        if not self.on_host:
            count = self._total(trainable)
            self.gradients = self._buffer(count, "gradients of the partitions", "gradients", self.dtype)
        g.begin("hooks on gradients")
        for parameter in (item for group in self.groups for item in group):
            g.enter(parameter.layer)
            sizes = scratch.zero3_whole(self._numel(parameter), self.degree, ITEMSIZE[self.held_dtype])
            g.scratch(*sizes, name="parameter gathered")
        g.enter(None)
        g.on_gradient = self.gradient_arrived

    # -- loading -------------------------------------------------------------------------------------------

    def _numel(self, parameter: Parameter) -> int:
        """Elements of one rank's part, padding included."""
        return self.coordinator.status[parameter].partition_numel

    def _total(self, parameters: Sequence[Parameter]) -> int:
        return sum(map(self._numel, parameters))

    def _buffer(self, count: int, name: str, category: str, dtype: str) -> Storage:
        return self.g.storage(count * ITEMSIZE[dtype], name, dtype, (count,), category)

    def _sub_groups(self, group: Sequence[Parameter]) -> list[list[Parameter]]:
        """_create_fp16_sub_groups"""
        if self._total(group) <= SUB_GROUP_ELEMENTS:
            return [list(group)]
        parts: list[list[Parameter]] = [[]]
        for parameter in group:
            if self._total(parts[-1]) >= SUB_GROUP_ELEMENTS:
                parts.append([])
            parts[-1].append(parameter)
        return parts

    def _load(self, job: Job) -> None:
        """_create_fp16_partitions_with_defragmentation, by way of the host, and _setup_for_real_optimizer."""
        g = self.g
        g.begin("partitions made one")
        trained = [parameter for group in self.groups for parameter in group]
        category = g.info[self._shard_id(trained[0])][0] if not self.params_on_host else ""
        for parameter in trained:
            g.enter(parameter.layer)
            self.coordinator.status[parameter].shard = None
        g.enter(None)
        if not self.params_on_host:
            name = "partitions of the parameters, flat"
            self.flat = self._buffer(self._total(trained), name, category, self.held_dtype)
        before: Tensor | None = None
        for index, group in enumerate(self.groups):
            shape = (self._total(group),)
            name = f"master weights of group {index}"
            master = Parameter(name, shape, "float32", Storage([], 0), None, True)
            if not self.on_host:
                if self.held_dtype != "float32":
                    before = g.new(shape, "float32", "partitions in float32", "workspace")
                held = g.new(shape, "float32", name, "optimizer")
                assert held.storage is not None
                master.storage = held.storage
                del held
            self.programs.append(OptimizerProgram(g, job, [master], 1))
        del before
        g.begin("optimizer states prepared")
        if not self.on_host:
            sizes = scratch.zero3_preparation([self._total(group) for group in self.groups])
            g.scratch(*sizes, name="gradients of the largest group")

    def _shard_id(self, parameter: Parameter) -> int:
        shard = self.coordinator.status[parameter].shard
        assert shard is not None
        return shard.id

    # -- hooks of the model --------------------------------------------------------------------------------

    def before_forward(self, layer: int | None, x: Tensor | None) -> None:
        """_start_of_forward_hook"""
        if layer is None:
            self.coordinator.begin_forward()

    def after_forward(self, layer: int | None) -> None:
        """Modules release what they have fetched."""

    def visit_backward(self, layer: int | None) -> None:
        """Modules fetch what they need."""

    def leave_backward(self, layer: int | None) -> None:
        """What is reduced together goes by size, not by block."""

    def gradient_arrived(self, parameter: Parameter) -> None:
        """reduce_independent_p_g_buckets_and_remove_grads, while the engine still holds the gradient."""
        count = prod(parameter.shape)
        if self.elements + count > self.bucket_elements:
            self._reduce()
        if self.elements + count <= self.bucket_elements:
            parameter.grad = Tensor(parameter.shape, self.dtype, self.bucket)
        self.elements += count
        self.pending.append(parameter)

    def end_backward(self) -> None:
        """independent_gradient_partition_epilogue and backward_epilogue."""
        self.g.begin(f"{self.g.group} end")
        self._reduce()
        self.is_first = False
        self.coordinator.end_backward()

    # -- reduction -----------------------------------------------------------------------------------------

    def _reduce(self) -> None:
        """__reduce_and_partition_ipg_grads, partition_grads"""
        if not self.pending:
            return
        pending = sorted(self.pending, key=lambda parameter: self.coordinator.status[parameter].number)
        self.pending.clear()
        self.elements = 0
        with self.g.on_stream(REDUCE_STREAM):
            reduced = self._scattered(pending)
            for parameter in pending:
                if self.on_host:
                    self._send_to_host(parameter)
                parameter.grad = None
            del reduced

    def _scattered(self, parameters: Sequence[Parameter]) -> Storage | None:
        """
        reduce_scatter_coalesced: a gradient that is alone and in equal parts is reduced in its place; others are copied
        together, rank after rank, with what is missing of equal parts.
        """
        counts = [prod(parameter.shape) for parameter in parameters]
        gradients = [self._in_bucket_dtype(parameter) for parameter in parameters]
        if len(counts) == 1 and counts[0] % self.degree == 0:
            return gradients[0].storage
        padding = [
            self.g.new((missing,), self.dtype, "padding of gradients", "workspace")
            for missing in scratch.zero3_padding(counts, self.degree)
        ]
        count = self._total(parameters) * self.degree
        together = self._buffer(count, "gradients reduced together", "comm", self.dtype)
        del padding, gradients
        return together

    def _in_bucket_dtype(self, parameter: Parameter) -> Tensor:
        """What is in the bucket has its dtype; of what was too large for it there is a copy, where that has another."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.dtype == self.dtype:
            return gradient
        return self.g.new(gradient.shape, self.dtype, f"{parameter.name} grad in {self.dtype}", "comm")

    def _send_to_host(self, parameter: Parameter) -> None:
        """partition_grads, _offload_grad_partition_at_boundary: the part comes back to be added to and measured."""
        g, count = self.g, self._numel(parameter)
        back = g.new((count,), self.dtype, f"{parameter.name} grad of the partition", "workspace")
        if self.is_last:
            g.scratch(*scratch.zero_norm(count), name=f"{parameter.name} norm of grad")
            if self.dtype != "float32":
                g.scratch(*scratch.zero_float_copy(count), name=f"{parameter.name} grad in float32")
        del back

    # -- step ----------------------------------------------------------------------------------------------

    def step(self, number: int) -> None:
        """Step `number` of the optimizer."""
        g = self.g
        outer, g.path = g.path, "optimizer"
        g.begin(f"parameters released {number}")
        self.coordinator.release_all()
        if not self.on_host:
            self._measure(number)
            for index, group in enumerate(self.groups):
                g.begin(f"gradients {index} {number}")
                gradient = self._flat_gradient(group)
                self.programs[index].update(number)
                g.begin(f"gradients freed {index} {number}")
                del gradient
        g.begin(f"parameters that stay {number}")
        self.coordinator.gather_persistent()
        self.is_first = True
        g.path = outer

    def _measure(self, number: int) -> None:
        """has_overflow in float16, get_grad_norm_direct"""
        g = self.g
        g.begin(f"norm {number}")
        if self.dtype == "float16":
            count = sum(map(self._total, self.groups))
            for infinite in (True, False):
                g.scratch(*scratch.zero3_overflow(count, infinite=infinite), name="gradients that overflow")
        for group in self.groups:
            norms = []
            for parameter in group:
                g.enter(parameter.layer)
                g.scratch(*scratch.zero_norm(self._numel(parameter)), name=f"{parameter.name} norm of grad")
                norms.append(g.new((), "float64", f"{parameter.name} norm of grad", "workspace"))
            g.enter(None)
            g.scratch(*scratch.zero_total_norm(len(norms)), name="norms, and their squares")
            norms.clear()

    def _flat_gradient(self, group: Sequence[Parameter]) -> Tensor | None:
        """_prepare_fp32_grad_for_sub_group: parts copied together, then cast where they are not float32."""
        shape, flat = (self._total(group),), None
        if len(group) > 1:
            flat = self.g.new(shape, self.dtype, "gradients of the partition, flat", "gradients")
        if self.dtype == "float32":
            return flat
        return self.g.new(shape, "float32", "gradients of the partition in float32", "gradients")

    def create_states(self) -> None:
        """What the first step creates."""
        for program in self.programs:
            program.create_states()

    def zero_grad(self, number: int) -> None:
        """Gradients keep their memory."""
