"""transformers' own `Trainer.train()` on meta tensors."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from memplan.errors import RunError, TraceError
from memplan.hf.arguments import check_trainer, training_arguments
from memplan.hf.trainer import collate, flattened, observed_trainer
from memplan.job.spec import Job
from memplan.tracing.activation_offload import OffloadedActivations, leave_head
from memplan.tracing.build import META
from memplan.tracing.hf_ranks import accelerate_on_ranks, arguments_of_ranks, name_shards
from memplan.tracing.recorder import Recorder
from memplan.tracing.sft_loss import check_trl, sft_loss
from memplan.tracing.sharded import finish_reductions
from memplan.tracing.trl_kernels import triton_of_trl
from memplan.train.offload import Mover
from memplan.train.parallel import is_sharded

MICRO_BATCHES = 3
"""From the third micro batch of a step on nothing changes, so no more are run."""

_LAUNCHERS = ("ACCELERATE_", "FSDP_", "DEEPSPEED_", "PARALLELISM_CONFIG_")
_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)


def check(job: Job) -> None:
    """Raise TraceError where the Trainer does not do what the job asks."""
    if job.loss_form() == "chunked":
        check_trl()
        job = replace(job, loss="full")
    try:
        check_trainer(job.replace(**{"offload.activations": "none"}))
    except RunError as refusal:
        raise TraceError(refusal.message, hint=refusal.hint) from refusal


def run_trainer(job: Job, model: nn.Module, recorder: Recorder, num_steps: int, mover: Mover) -> None:
    """
    Steps 1 to `num_steps` of the Trainer, recorded; `mover` offloads the inputs of checkpointed blocks. accelerate is
    made to believe that its device is `meta`, so that it moves batches, casts and wraps `forward` as it would for a
    GPU. The scalars of float16's gradient scaler are not there.
    """
    check(job)
    num_batches = job.gradient_accumulation_steps
    job = replace(job, gradient_accumulation_steps=min(num_batches, MICRO_BATCHES))

    def end_step(step: int) -> None:
        if step == num_steps:
            recorder.mark("end", step)

    observed: Any = observed_trainer(recorder.mark, end_step)
    offloaded = None
    if job.offload.activations != "none":
        offloaded = OffloadedActivations(recorder, model, streams=job.offload.activations == "streams")
        leave_head(model)

    class OnMeta(sft_loss(observed) if job.loss_form() == "chunked" else observed):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            pretend_meta(job.autocast)
            if job.autocast == "float16":
                self.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda module, **_: prepare(module, device_placement=False)

        def _move_model_to_device(self, *_: Any) -> None:
            """The model is where it is."""

        def training_step(self, *positional: Any, **options: Any) -> Any:
            with offloaded or nullcontext():
                return super().training_step(*positional, **options)

        def _prepare_for_training(self, *positional: Any, **options: Any) -> Any:
            prepared = super()._prepare_for_training(*positional, **options)
            finish_reductions(self.model_wrapped)
            if is_sharded(job):
                name_shards(recorder, job, self.model)
            recorder.watch(trained_parameters(self.model), unwrapped(self.optimizer))
            return prepared

        def get_batch_samples(self, *positional: Any, **options: Any) -> Any:
            batches, num_items = super().get_batch_samples(*positional, **options)
            held = _Batches(batches)
            held.others = self.__dict__.pop("_others")
            return held, num_items

        def _get_num_items_in_batch(self, batches: list[Any], *positional: Any, **options: Any) -> Any:
            """Those that are not run are on the device as well, and counted."""
            self._others = [
                {name: torch.empty_like(tensor) for name, tensor in batches[-1].items()}
                for _ in range(num_batches - len(batches))
            ]
            for other in self._others:
                for name, tensor in other.items():
                    recorder.name(tensor, "inputs", name)
            return super()._get_num_items_in_batch([*batches, *self._others], *positional, **options)

    rows = [{"input_ids": [0] * job.max_seq_len}] * (
        job.micro_batch_size * job.gradient_accumulation_steps * job.world_size * num_steps
    )
    with ExitStack() as stack:
        stack.enter_context(apart())
        stack.enter_context(saved_by(mover))
        if job.world_size > 1:
            stack.enter_context(accelerate_on_ranks(recorder, job))
        if job.loss_form() == "chunked":
            stack.enter_context(triton_of_trl())
        folder = stack.enter_context(TemporaryDirectory(prefix="memplan-"))
        arguments = training_arguments(
            # accelerate refuses float16 on the CPU, where it believes to be until it is told otherwise.
            job if job.autocast is None else replace(job, autocast="bfloat16"),
            folder,
            steps=num_steps,
            use_cpu=True,
            base=_arguments_on_meta(),
            dataloader_pin_memory=False,
            logging_nan_inf_filter=False,  # it looks at the loss, which has no value here
            **arguments_of_ranks(job),
        )
        OnMeta(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=flattened if job.padding_free else collate,
        ).train()
    if offloaded is not None:
        recorder.pinned_peak_bytes = offloaded.peak_bytes


class _Batches(list[Any]):
    """The micro batches of a step that are run, and what is beside them."""

    others: list[Any]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by the names it has without peft."""
    return {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _arguments_on_meta() -> type:
    from transformers import TrainingArguments

    class ArgumentsOnMeta(TrainingArguments):
        @property
        def device(self) -> torch.device:
            _ = super().device  # sets up what else hangs on it
            return META

    return ArgumentsOnMeta


def pretend_meta(autocast: str | None) -> None:
    from accelerate.state import AcceleratorState, PartialState

    for state in (AcceleratorState, PartialState):
        state._shared_state["device"] = META
    if autocast == "float16":
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that accelerate wrapped."""
    return unwrapped(optimizer.optimizer) if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer


@contextmanager
def saved_by(mover: Mover) -> Iterator[None]:
    """What transformers' checkpointing saves on the CPU, this offloads (modeling_utils.py, `save_on_cpu`)."""
    from transformers import modeling_utils

    def save_on_cpu(**_: Any) -> saved_tensors_hooks:
        return saved_tensors_hooks(mover.to_host, mover.to_device)

    if not hasattr(modeling_utils, "save_on_cpu"):  # versions that offload nothing
        yield
        return
    with patch.object(modeling_utils, "save_on_cpu", save_on_cpu):
        yield


@contextmanager
def apart() -> Iterator[None]:
    """
    accelerate's process-wide state, what launchers tell it through the environment, and random states: as they were,
    so that a run in this process goes on as if nothing had been.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [state._shared_state for state in (AcceleratorState, PartialState, GradientState)]
    before = [dict(state) for state in states]
    environment = dict(os.environ)
    python_random = random.getstate()
    try:
        for state in states:
            state.clear()
        for name in environment:
            if name in _RANKS or name.startswith(_LAUNCHERS):
                del os.environ[name]
        with torch.random.fork_rng(devices=[]), _numpy_random():
            yield
    finally:
        random.setstate(python_random)
        os.environ.clear()
        os.environ.update(environment)
        for state, values in zip(states, before):
            state.clear()
            state.update(values)


@contextmanager
def _numpy_random() -> Iterator[None]:
    import numpy

    state = numpy.random.get_state()
    try:
        yield
    finally:
        numpy.random.set_state(state)
