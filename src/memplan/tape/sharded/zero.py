"""
Stages 1 and 2 of DeepSpeed's ZeRO: weights whole and flat on every rank, gradients reduced bucket by bucket, and the
optimizer's step over this rank's partition (deepspeed/runtime/zero/stage_1_and_2.py of 0.19.8, whose functions are
named below).

Stage 2 fills the bucket as gradients arrive, and keeps of each bucket what lies in its own partition. Stage 1 keeps
all gradients until the last micro batch, and fills it then. A gradient that is larger than the bucket is reduced where
it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from memplan.job.spec import Job
from memplan.tape import scratch
from memplan.tape.graph import Graph
from memplan.tape.optimizer import OptimizerProgram, parameter_groups
from memplan.tape.sharded.zero_groups import FlatGroup, reduce_bucket_elements, zero_stage
from memplan.tape.tensors import ITEMSIZE, Parameter, Storage, Tensor


class ZeroOptimizer:
    """
    DeepSpeedZeroOptimizer of the fullest rank: hooks of the model's backward pass (`Units`), and the step.

    That rank is the last in stage 2, whose gradients come first, when all activations are there, and the first in
    stage 1, which reduces in the order of the parameters.
    """

    def __init__(self, g: Graph, job: Job, trainable: Sequence[Parameter], hidden_size: int) -> None:
        self.g = g
        self.stage = zero_stage(job)
        degree = job.parallel.dp_shard
        self.rank = 0 if self.stage == 1 else degree - 1
        self.on_host = job.offload.optimizer
        self.groups = [FlatGroup(group, degree) for group in parameter_groups(job, trainable)]
        self.group_of = {parameter: group for group in self.groups for parameter in group.parameters}
        self.dtype = self.groups[0].dtype
        self.bucket_elements = reduce_bucket_elements(hidden_size)
        self.is_last = True
        self.casts_inputs = False
        self.bucket: Storage | None = None
        self.pending: list[Parameter] = []
        """Parameters whose gradients wait in the bucket, or are alone too large for it."""
        self.elements = 0
        self.kept: Storage | None = None
        """`grads_in_partition`: of this micro batch."""
        self.accumulated: Storage | None = None
        """`all_grad_tensors`, then `averaged_gradients`: of the step."""
        self.padding: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.held: list[Tensor] = []
        self.programs: list[OptimizerProgram] = []
        self._load(job)
        g.on_gradient = self.gradient_arrived

    # -- loading -------------------------------------------------------------------------------------------

    def _load(self, job: Job) -> None:
        """`__init__` and initialize_optimizer_states."""
        g = self.g
        for index, group in enumerate(self.groups):
            self._flatten(index, group)
            shape = (group.partition,)
            partition = Parameter(
                f"master weights of group {index}", shape, "float32", Storage([], 0), None, True
            )
            if not self.on_host:
                copy = g.new(shape, group.dtype, "copy of the partition", "workspace")
                master = copy
                if group.dtype != "float32":
                    master = g.new(shape, "float32", partition.name, "optimizer")
                g.recategorize(master, "optimizer", partition.name)
                assert master.storage is not None
                partition.storage = master.storage
                del copy, master
            self.programs.append(OptimizerProgram(g, job, [partition], 1))
        g.begin("optimizer states prepared")
        if self.on_host:
            largest = max(prod(parameter.shape) for parameter in self.group_of)
            self.held.append(g.new((largest,), self.dtype, "gradient on its way to the host", "comm"))
            return
        sizes = scratch.zero_preparation([group.partition for group in self.groups])
        g.scratch(*sizes, name="gradients of the partition")

    def _flatten(self, index: int, group: FlatGroup) -> None:
        """
        Parameters become views of one tensor. DeepSpeed makes it on the device where that has room for both; the
        smallest card that the job completes on has not, and parameters go through the host.
        """
        g = self.g
        g.begin(f"flatten {index}")
        category = g.info[group.parameters[0].storage.id][0]  # type: ignore[union-attr]
        for parameter in group.parameters:
            g.enter(parameter.layer)
            parameter.storage = None
        g.enter(None)
        flat = g.new((group.padded,), group.dtype, f"parameters of group {index}, flat", category)
        for parameter in group.parameters:
            parameter.storage = flat.storage

    # -- hooks of the model --------------------------------------------------------------------------------

    def before_forward(self, layer: int | None, x: Tensor | None) -> None:
        """Weights are whole."""

    def after_forward(self, layer: int | None) -> None:
        """Weights stay."""

    def visit_backward(self, layer: int | None) -> None:
        """Weights are whole."""

    def leave_backward(self, layer: int | None) -> None:
        """What is reduced together goes by size, not by block."""

    def gradient_arrived(self, parameter: Parameter) -> None:
        """process_gradients: a hook of each parameter, while the engine still holds the gradient."""
        if self.bucket is None:
            num_bytes = self.bucket_elements * ITEMSIZE[self.dtype]
            self.bucket = self.g.storage(num_bytes, "bucket of gradients", category="comm")
        if self.stage == 2:
            self._add(parameter)

    def end_backward(self) -> None:
        """reduce_gradients and independent_gradient_partition_epilogue."""
        if self.stage == 1 and not self.is_last:
            return
        g = self.g
        g.begin(f"{g.group} end")
        if self.stage == 1:
            for group in self.groups:
                for parameter in group.parameters:
                    g.enter(parameter.layer)
                    if parameter.grad is not None:
                        self._add(parameter)
        g.enter(None)
        self._reduce()
        if self.accumulated is None:
            self.accumulated = self.kept
        if self.is_last and not self.on_host:
            self.padding = [
                g.new((missing,), self.dtype, "padding of the gradients", "gradients")
                for missing in map(self._missing, self.groups)
                if missing
            ]
        self.bucket = None
        for group in self.groups:
            for parameter in group.parameters:
                g.enter(parameter.layer)
                parameter.grad = None
        g.enter(None)
        self.kept = None

    def _missing(self, group: FlatGroup) -> int:
        """Elements of the partition that no parameter fills (get_flat_partition)."""
        return group.partition - sum(
            group.elements_of(self.rank, parameter) for parameter in group.parameters
        )

    # -- reduction -----------------------------------------------------------------------------------------

    def _add(self, parameter: Parameter) -> None:
        """reduce_independent_p_g_buckets_and_remove_grads"""
        count = prod(parameter.shape)
        if self.elements + count > self.bucket_elements:
            self._reduce()
        if count <= self.bucket_elements:
            parameter.grad = Tensor(parameter.shape, self.dtype, self.bucket)
        elif self.on_host:
            parameter.grad = self.g.new(parameter.shape, self.dtype, f"{parameter.name} grad", "gradients")
        self.elements += count
        self.pending.append(parameter)

    def _reduce(self) -> None:
        """reduce_ipg_grads"""
        self._all_reduce()
        for parameter in self.pending:
            if self.group_of[parameter].elements_of(self.rank, parameter):
                self._keep(parameter)
            elif self.stage == 2:
                parameter.grad = None
        self.pending.clear()
        self.elements = 0

    def _all_reduce(self) -> None:
        """
        average_tensor, allreduce_and_scatter: neighbours of one partition are one slice, and several slices are
        copied together before they are reduced.
        """
        slices: list[tuple[int, int]] = []
        for parameter in self.pending:
            for rank, count in self.group_of[parameter].parts(parameter):
                if slices and slices[-1][0] == rank:
                    slices[-1] = (rank, slices[-1][1] + count)
                else:
                    slices.append((rank, count))
        together: list[int] = []
        for _, count in slices:
            together.append(count)
            if sum(together) > self.bucket_elements:
                self._copy_together(together)
                together = []
        self._copy_together(together)

    def _copy_together(self, counts: list[int]) -> None:
        sizes = scratch.zero_slices(counts, ITEMSIZE[self.dtype])
        self.g.scratch(*sizes, name="slices of several partitions, reduced")

    def _keep(self, parameter: Parameter) -> None:
        """copy_grads_in_partition"""
        if self.on_host:
            self._send_to_host(parameter)
            return
        if self.kept is None:
            count = sum(prod(ours.shape) for group in self.groups for ours in group.of(self.rank))
            name = "gradients of the partition"
            self.kept = self.g.storage(count * ITEMSIZE[self.dtype], name, self.dtype, (count,), "gradients")
        parameter.grad = Tensor(parameter.shape, self.dtype, self.kept)

    def _send_to_host(self, parameter: Parameter) -> None:
        """set_norm_for_param_grad_in_gpu and async_inplace_copy_grad_to_fp32_buffer_from_gpu, of a last micro batch."""
        if not self.is_last:
            return
        g = self.g
        count = self.group_of[parameter].elements_of(self.rank, parameter)
        self._norm(parameter, count)
        if self.dtype != "float32":
            g.scratch(*scratch.zero_float_copy(count), name=f"{parameter.name} grad in float32")
        parameter.grad = None

    # -- step ----------------------------------------------------------------------------------------------

    def _norm(self, parameter: Parameter, count: int) -> None:
        """Norms are taken of float64 copies (get_norm_dtype)."""
        g = self.g
        copy = g.new((count,), "float64", f"{parameter.name} grad in float64", "workspace")
        self.norms.append(g.new((), "float64", f"{parameter.name} norm of grad", "workspace"))
        del copy

    def step(self, number: int) -> None:
        """Step `number` of the optimizer."""
        g = self.g
        outer, g.path = g.path, "optimizer"
        if not self.on_host:
            for index, group in enumerate(self.groups):
                self._total_norm(f"{index} {number}", group)
            for index, group in enumerate(self.groups):
                g.begin(f"gradients {index} {number}")
                gradient = self._flat_gradient(group)
                if group is self.groups[-1]:
                    self.accumulated = None
                    self.padding.clear()
                self.programs[index].update(number)
                g.begin(f"gradients freed {index} {number}")
                del gradient
        g.begin(f"norms freed {number}")
        self.norms.clear()
        g.path = outer

    def _total_norm(self, label: str, group: FlatGroup) -> None:
        """get_grad_norm_direct"""
        g = self.g
        g.begin(f"norm {label}")
        ours = group.of(self.rank)
        for parameter in ours:
            g.enter(parameter.layer)
            self._norm(parameter, group.elements_of(self.rank, parameter))
        g.enter(None)
        g.scratch(*scratch.zero_total_norm(len(ours)), name="norms, and their squares")
        self.norms.clear()

    def _flat_gradient(self, group: FlatGroup) -> Tensor | None:
        """Pieces of several gradients are copied together; what is not float32 is then cast, and the copy goes."""
        g, shape = self.g, (group.partition,)
        flat = None
        if len(group.of(self.rank)) + bool(self._missing(group)) > 1:
            flat = g.new(shape, group.dtype, "gradients of the partition, flat", "gradients")
        if group.dtype == "float32":
            return flat
        return g.new(shape, "float32", "gradients of the partition in float32", "gradients")

    def create_states(self) -> None:
        """What the first step creates."""
        for program in self.programs:
            program.create_states()

    def zero_grad(self, number: int) -> None:
        """Gradients have gone in the step."""
