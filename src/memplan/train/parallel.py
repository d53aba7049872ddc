"""
One step of the model on several processes: DDP, or FSDP2 with a decoder block as the unit of sharding.

    NO_SHARD        a whole model on every rank; gradients averaged in buckets during backward (DDP)
    FULL_SHARD      every block is gathered before it runs, forward and backward, and let go after it
    SHARD_GRAD_OP   blocks stay gathered from forward to backward
    HYBRID_SHARD    FULL_SHARD within a group of `dp_shard` ranks, gradients averaged over `dp_replicate` of them

What is outside the blocks, embeddings, last norm and head, is one more unit: the root, whose forward pass is everything
from token ids to the loss, so that the head is whole where the loss reads its weight.

NPT blocks run their backward pass inside forward, where no hook of DDP or FSDP sees it. Their tensors are small: they
are made after the rest is cut, are whole on every rank, and their gradients are added up by one all-reduce at the end
of a step.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memplan.errors import RunError
from memplan.job.spec import Job
from memplan.tape.sharded.sharding import SHARDED
from memplan.train.build import Built, build_model
from memplan.train.data import MicroBatch
from memplan.train.group import ALONE, Group
from memplan.train.loss import (
    chunked_cross_entropy,
    evaluation_cross_entropy,
    full_cross_entropy,
    fused_cross_entropy,
)

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

    from memplan.npt.distillation import EndToEnd


def is_sharded(job: Job) -> bool:
    """Whether the job's weights are cut or fetched unit by unit, even if one rank holds them all."""
    return job.parallel.strategy in SHARDED or job.offload.params


class Step(nn.Module):
    """From token ids to the loss of one micro batch; for NPT to nothing, since its blocks take their own loss."""

    def __init__(self, job: Job, built: Built, device_type: str) -> None:
        super().__init__()
        self.job = job
        self.device_type = device_type
        self.model = built.model
        # Parts of the model: in a tuple, so that they are not registered a second time.
        self._parts = (built.decoder, built.head)
        self.softcap = built.logit_softcap
        self.scaling = built.logits_scaling
        self.loss_form = built.loss_form
        self.shifts = built.shifts

    def forward(
        self, batch: MicroBatch, num_tokens: float | None = None, *, predicts: bool = False
    ) -> Tensor | None:
        """
        Summed loss over `num_tokens`, a scalar; None without that number, as in the steps of NPT. If it `predicts`, the
        likeliest next token of every sequence, (batch,) int64.

        Args:
            num_tokens: predicted tokens of the global batch, over the number of ranks: the mean over ranks is then the
                loss of the global batch.
        """
        decoder, head = self._parts
        with self._autocast():
            hidden = decoder(**decoder_inputs(batch)).last_hidden_state
            if predicts:
                following: Tensor = head(hidden[:, -1]).argmax(-1)
                return following
            if num_tokens is None:
                return None
            if self.job.method == "npt":
                return evaluation_cross_entropy(hidden, head, batch.labels, num_tokens)
            if self.loss_form != "full":
                linear_loss = chunked_cross_entropy if self.loss_form == "chunked" else fused_cross_entropy
                return linear_loss(
                    hidden, head, batch.labels, num_tokens, softcap=self.softcap, scaling=self.scaling
                )
            logits = head(hidden)
            del hidden
            if self.scaling is not None:
                logits = logits / self.scaling
            if self.softcap is not None:
                logits = logits / self.softcap
                logits = torch.tanh(logits)
                logits = logits * self.softcap
            return full_cross_entropy(logits, batch.labels, num_tokens, shifts=self.shifts)

    def distil(self, batch: MicroBatch) -> EndToEnd:
        """NPT, end to end: the objective, and what is measured with it."""
        from memplan.npt import end_to_end

        decoder, head = self._parts
        npt = self.job.npt
        with self._autocast():
            return end_to_end(
                self.model,
                decoder,
                decoder_inputs(batch),
                batch.token_mask,
                head=head,
                logits_weight=npt.logits_weight,
                temperature=npt.temperature,
            )

    def _autocast(self) -> torch.autocast:
        dtype = self.job.autocast
        return torch.autocast(
            self.device_type, dtype=getattr(torch, dtype) if dtype else None, enabled=dtype is not None
        )


def decoder_inputs(batch: MicroBatch) -> dict[str, Any]:
    """
    What the decoder is called with. Packed documents are told apart by their positions alone: transformers sees
    them only where there is neither an attention mask nor a cache (masking_utils.find_packed_sequence_indices).
    """
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    return {"input_ids": batch.input_ids, "use_cache": False, **positions}


class Parallel:
    """
    The job's model as one rank of a group runs it; `build_parallel` makes it.

    Args:
        built: every rank has the same weights in it, or its part of them.
        root: what `shard` was applied to; None if the model is whole.
    """

    def __init__(self, job: Job, built: Built, group: Group = ALONE, *, root: Step | None = None) -> None:
        self.group = group
        self.built = built
        self.step = root or Step(job, built, group.device.type)
        self.is_sharded = root is not None
        self._reduces_itself = job.method == "npt"
        self.module: nn.Module = self.step
        if group.world_size > 1 and not self.is_sharded and not self._reduces_itself:
            self.module = _ddp(self.step)
        self.trainable = {
            name: parameter for name, parameter in built.model.named_parameters() if parameter.requires_grad
        }
        """By the names of `built.model`. While a unit is gathered, the model itself has others in their place."""

    def __call__(self, batch: MicroBatch, num_tokens: float | None = None) -> Any:
        """As `Step.forward`."""
        return self.module(batch, num_tokens)

    def next_tokens(self, batch: MicroBatch) -> Tensor:
        """The likeliest next token of every sequence, (batch,) int64; the batch has no padding."""
        following: Tensor = self.module(batch, predicts=True)
        return following

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """
        Around forward and backward of one micro batch: gradients of whole models travel after the last one only.

        Sharded gradients are reduced every time. Keeping them whole until the last would take the memory that sharding
        is there to save; between the groups of HYBRID_SHARD only shards wait.
        """
        waits: Any = nullcontext()
        if isinstance(self.module, DistributedDataParallel) and not is_last:
            waits = self.module.no_sync()
        elif _is_unit(self.module):
            self.module.set_requires_all_reduce(is_last)
        with waits:
            yield

    def reduce_gradients(self) -> None:
        """Add up over ranks what no hook has: NPT gradients, in one flat buffer."""
        if not self._reduces_itself or self.group.world_size == 1:
            return
        gradients = [parameter.grad for parameter in self.trainable.values() if parameter.grad is not None]
        flat = self.group.add_up(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(total.view_as(gradient))

    def settle(self) -> None:
        """Let go of what a forward pass without backward has left gathered."""
        for module in self.step.modules():
            if _is_unit(module):
                module.reshard()

    def all_finite(self) -> bool:
        """Whether every trained number of every rank is finite."""
        mine = all(bool(local_part(parameter).isfinite().all()) for parameter in self.trainable.values())
        return not self.group.highest(int(not mine))


def _is_unit(module: Any) -> bool:
    """Whether `fully_shard` was applied. FSDP is not imported to ask: that takes as long as transformers."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _ddp(step: Step) -> DistributedDataParallel:
    """Nothing is sent before the first gradient: every rank has made the same model, and its buffers never change."""
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch 2.13 has renamed it.
    syncs_buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(step, init_sync=False, **{syncs_buffers: False})


def build_parallel(
    job: Job,
    config: dict[str, Any],
    group: Group,
    *,
    weights_path: str | None,
    token_ids: Sequence[int] | None = None,
) -> Parallel:
    """
    The job's model on every rank of the group; arguments and errors as `build_model`.

    A sharded one is cut before it has any memory. Every rank then fills its own part: at no time is more of the model
    whole than one tensor.
    """
    root: Step | None = None

    def cut(built: Built) -> None:
        nonlocal root
        root = Step(job, built, group.device.type)
        shard(job, built, root, group)

    built = build_model(
        job,
        config,
        group.device,
        weights_path=weights_path,
        shard=cut if is_sharded(job) else None,
        token_ids=token_ids,
    )
    if root is not None and job.has_quantized_base:
        from memplan.train.quantize import check_sharded

        check_sharded(root)
    return Parallel(job, built, group, root=root)


def shard(job: Job, built: Built, root: nn.Module, group: Group) -> None:
    """
    Cut every block of the model, and then what is left of `root`, over the ranks.

    Raises:
        RunError: what trains outside the blocks is of several dtypes, which FSDP does not reduce together.
    """
    from torch.distributed.fsdp import fully_shard

    _check_outside(job, built)
    options: dict[str, Any] = {
        "mesh": make_mesh(job, group),
        "mp_policy": mixed_precision(job),
        "offload_policy": offload_policy(job, group.device),
    }
    # Without a backward pass of their own, NPT models would stay gathered for good.
    keeps = job.parallel.strategy == "SHARD_GRAD_OP" and job.method != "npt"
    for block in decoder_blocks(built.model):
        fully_shard(block, reshard_after_forward=not keeps, **options)
    fully_shard(root, reshard_after_forward=True if job.method == "npt" else None, **options)


def _check_outside(job: Job, built: Built) -> None:
    inside = {id(item) for block in decoder_blocks(built.model) for item in block.parameters()}
    trained = [item for item in built.trainable if id(item) not in inside]
    if len({item.dtype for item in trained}) > 1:
        raise RunError(
            f"an adapter in {job.lora.dtype} and a copy of `lora.modules_to_save` in {job.saved_dtype}, both outside "
            "the blocks, cannot be sharded together",
            hint=f"use `--set lora.modules_to_save_dtype={job.lora.dtype}`, or `--set lora.dtype={job.saved_dtype}`",
        )


def make_mesh(job: Job, group: Group) -> dist.DeviceMesh:
    """Ranks in groups of `dp_shard`, next to each other, so that what is gathered most stays within a machine."""
    sharded, replicas = job.parallel.dp_shard, job.parallel.dp_replicate
    kind = group.device.type
    if replicas == 1:
        return dist.init_device_mesh(kind, (sharded,), mesh_dim_names=("shard",))
    return dist.init_device_mesh(kind, (replicas, sharded), mesh_dim_names=("replicate", "shard"))


def mixed_precision(job: Job) -> MixedPrecisionPolicy:
    """Gather and compute in the job's compute dtype, reduce in float32; what a unit returns is left as it is."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    compute = getattr(torch, job.autocast or job.dtype)
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)


def offload_policy(job: Job, device: torch.device) -> OffloadPolicy:
    """Shards in host memory if the job says so; pinned where there is a GPU to copy to."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    return CPUOffloadPolicy(pin_memory=device.type == "cuda") if job.offload.params else OffloadPolicy()


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a transformers model, with or without adapters or NPT, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, or its shard."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()
