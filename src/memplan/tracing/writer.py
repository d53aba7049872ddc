"""
The trace writer: a job's real model, adapters, optimizer and loop, run on meta tensors with the versions at hand.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from memplan.budget.host_sizes import HostSizes
from memplan.budget.result import ParameterCount
from memplan.errors import JobError, MemplanError, TraceError
from memplan.job.spec import Job
from memplan.tape.backends import Target
from memplan.tape.behaviour import Behaviour
from memplan.tape.low_bit import LOW_BIT
from memplan.tape.packing import refuse_left_in_16_bits
from memplan.tape.repeat import Expansion
from memplan.tape.tape import Storage, Tape
from memplan.tracing.autocast import emulated
from memplan.tracing.build import META, build_meta
from memplan.tracing.calibrate import recorder_for
from memplan.tracing.cuda import at_hand, like_device
from memplan.tracing.dtypes import is_of_dtypes
from memplan.tracing.host import HostMemory, HostMover
from memplan.tracing.load import load
from memplan.tracing.loops import run_loop
from memplan.tracing.low_bit import torchao_on_meta
from memplan.tracing.optimizers import bitsandbytes_on_meta, own_quantization_maps
from memplan.tracing.packages import stand_ins
from memplan.tracing.reference_code import reference_code
from memplan.tracing.sharded import is_distributed, rank_zero
from memplan.train.group import Group
from memplan.train.offload import PlainMover
from memplan.train.parallel import is_sharded
from memplan.train.refusals import TORCH_OPTIMIZERS
from memplan.train.tokens import first_line

NUM_STEPS = 2
"""Optimizer states appear in the first step; from the second on every step is the same."""


@dataclass(frozen=True)
class Traced:
    """The tape of a traced job, and what was learnt of the model on the way."""

    expansion: Expansion
    parameters: ParameterCount
    sizes: HostSizes
    """What host memory depends on."""
    target: Target
    """What attention ran on, and in which kernels."""
    class_name: str
    """The class of transformers that was traced."""
    unknown_values: int
    """How often the model's code looked at a value that is not known; it was told 1."""
    replaced_packages: frozenset[str]
    """Packages in place of whose kernels transformers ran code of its own."""

    def flatten(self) -> Tape:
        return self.expansion.flatten()

    def categories(self) -> list[str]:
        return self.expansion.categories()

    def describe(self, storage_id: int) -> Storage:
        return self.expansion.describe(storage_id)


def trace_job(
    job: Job, config: dict[str, Any], *, device: str = "cuda", num_steps: int = NUM_STEPS, whole: bool = False
) -> Traced:
    """
    The tape of loading and of `num_steps` optimizer steps, written by running them on meta tensors.

    Args:
        config: the model's `config.json`.
        device: `cuda` or `cpu`: whose kernels and libraries the tape is of.
        whole: trace every block; else a few, which are repeated exactly where they are alike.

    Raises:
        TraceError: the job cannot be run on meta tensors.
        UnknownModel: the installed transformers cannot build the model.
        JobError: DeepSpeed runs the job, or transformers would not store the base in 4 bits.
    """
    if job.parallel.strategy.startswith("ZERO_"):
        raise JobError(
            f"`{job.parallel.strategy}` is DeepSpeed's, which the trace does not run",
            hint="use `--engine shape`, whose plan follows DeepSpeed's source, or `parallel.strategy: FULL_SHARD`",
        )
    _refuse_untraced(job)
    refuse_left_in_16_bits(job, str(config.get("model_type")))
    # DDP's buckets hold gradients of several blocks; accelerate's `no_sync` and norms are of all blocks at once.
    whole = whole or job.offload.activations != "none"  # which wait for copies of several blocks
    if not whole and not (job.world_size > 1 and (job.loop == "hf_trainer" or not is_sharded(job))):
        try:
            return _trace(job, config, device, num_steps, whole=False)
        except MemplanError:
            raise
        except (
            Exception
        ):  # blocks that are not alike (NotRepeatable), or whose code cannot do without the others
            pass
    return _trace(job, config, device, num_steps, whole=True)


def _refuse_untraced(job: Job) -> None:
    """What loops are not traced with."""
    if job.loop == "memplan":
        _refuse_unshardable(job)
        return
    if job.offload.params or (job.world_size > 1 and job.loop == "script"):
        asked = "jobs with `offload.params`" if job.offload.params else "jobs on several GPUs"
        raise TraceError(
            f"{asked} are not traced with `loop: {job.loop}`",
            hint="use `--engine shape`, or `--set loop=memplan`",
        )
    if job.use_reentrant and job.world_size > 1 and job.activation_checkpointing != "none":
        raise TraceError(
            "`use_reentrant` is traced on one GPU: DDP refuses it where it looks for unused parameters",
            hint="use `--engine shape`, which plans it without that",
        )
    if job.offload.activations != "none" and job.use_reentrant and job.activation_checkpointing != "none":
        raise TraceError(
            "`offload.activations` is not planned beside `use_reentrant`, whose recomputation saves tensors anew",
            hint="use `--set use_reentrant=false`",
        )
    if job.offload.activations != "none" and (job.loss == "fused" or job.kernels != "torch"):
        asked = "loss: fused" if job.loss == "fused" else f"kernels: {job.kernels}"
        raise TraceError(
            f"`offload.activations` is planned by a trace alone, and `{asked}` is not traced",
            hint="`--set loss=full --set kernels=torch` plans what holds more, `--set offload.activations=none` "
            "plans checkpointing alone",
        )
    if job.offload.activations != "none" and is_sharded(job):
        raise TraceError(
            "`offload.activations` is not planned with sharded weights, which it takes to the host as well",
            hint="use `--set parallel.strategy=NO_SHARD`, or `--set activation_offload=true` in its place",
        )
    if job.parallel.fsdp_version == 1:
        raise TraceError(
            "FSDP1 is not traced", hint="use `--engine shape`, or `--set parallel.fsdp_version=2`"
        )
    if job.loop == "script" and job.loss == "chunked":
        raise TraceError(
            "`loop: script` is traced with the model's own loss, not with `loss: chunked`",
            hint="use `--engine shape`, or `--set loss=full`",
        )


def _refuse_unshardable(job: Job) -> None:
    """What torch and our own loop cannot do with FSDP2's shards."""
    if not is_sharded(job):
        return
    if job.offload.optimizer and not job.offload.params:
        raise TraceError(
            "memplan's own loop, which is traced, has no `offload.optimizer` alone with sharded weights",
            hint="use `--engine shape`, or `--set offload.params=true`, which offloads the states as well",
        )
    if job.optimizer == "adafactor" or (job.optimizer, job.optimizer_kernel) == ("sgd", "fused"):
        kernel = " with `optimizer_kernel: fused`" if job.optimizer == "sgd" else ""
        raise TraceError(
            f"torch's `optimizer: {job.optimizer}`{kernel} cannot step sharded weights",
            hint="use `--set optimizer=adamw`, or `--engine shape`",
        )


def _trace(job: Job, config: dict[str, Any], device: str, num_steps: int, *, whole: bool) -> Traced:
    behaviour = at_hand(Behaviour.for_job(job))
    target = behaviour.target(device)
    on_gpu = device == "cuda"
    recorder = recorder_for(behaviour, device)
    import_module("transformers.utils.logging")  # gives loggers what `reference_code` listens to
    with _quiet(), reference_code() as replaced_packages, ExitStack() as stack:
        group = stack.enter_context(rank_zero(recorder, job)) if is_distributed(job) else Group(device=META)
        mover = HostMover() if on_gpu else PlainMover()
        meta = build_meta(job, config, group, mover=mover, whole=whole)
        stack.enter_context(stand_ins(recorder, job))
        stack.enter_context(like_device(target))
        stack.enter_context(emulated(casts=job.autocast is not None, device_types=(device, META.type)))
        recorder.multiplicity = meta.multiplicity()
        if job.has_quantized_base and not job.has_gptq_base:
            stack.enter_context(own_quantization_maps())
        stack.enter_context(torchao_on_meta(job, target.multiprocessors))
        if job.optimizer not in (*TORCH_OPTIMIZERS, *LOW_BIT):
            stack.enter_context(bitsandbytes_on_meta())
        if job.offload.params:
            recorder.host = HostMemory(takes_copies=True)
            stack.enter_context(recorder.host.fetching(recorder.name))
        load(recorder, job, meta, on_device=on_gpu and behaviour.loads_on_device)
        if job.offload.optimizer and on_gpu:
            recorder.host = recorder.host or HostMemory(takes_copies=False)
        stack.enter_context(recorder.active())
        try:
            held = run_loop(job, meta, group, recorder, num_steps, mover)
        except Exception as error:
            ours = isinstance(error, MemplanError)
            if whole and recorder.unknown_values and not ours and not is_of_dtypes(error):
                raise TraceError(
                    f"`{job.model}` looks at values that only real data has, as at how many tokens an expert gets, and "
                    f"with 1 for each of the {recorder.unknown_values} it ends: {first_line(error)}",
                    hint="`memplan record` measures a few real steps of it",
                ) from error
            raise
        # What is freed when the steps have ended, and when the model goes, is not part of the tape.
        events = recorder.events[: recorder.marks[-1][0]]
    del held
    trainable = meta.count_added()
    total = meta.num_parameters + (0 if job.method == "full" else trainable)
    return Traced(
        Expansion(recorder, events, recorder.marks, meta.selection),
        ParameterCount(total=total, trainable=trainable, active=None if meta.has_experts() else total),
        meta.sizes(trainable)._replace(offloaded=recorder.pinned_peak_bytes),
        target,
        meta.class_name,
        recorder.unknown_values,
        frozenset(replaced_packages),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of libraries, and no garbage collection in between: it frees what only cycles hold."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if enabled:
            gc.enable()
