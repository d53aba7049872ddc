"""
A Trainer that somebody else built, run on meta tensors: its class, its model, its collator, its loss.

The run is made by a stand-in that shares the model and whatever else hangs on the Trainer, and has its own loop state,
accelerator, optimizer and callbacks, so that the Trainer itself goes on as if nothing had been.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from memplan.errors import TraceError
from memplan.job.spec import AllocatorSettings, Job
from memplan.tracing.activation_offload import OffloadedActivations
from memplan.tracing.build import META
from memplan.tracing.hf_loop import MICRO_BATCHES, apart, pretend_meta, saved_by, unwrapped
from memplan.tracing.host import HostMover
from memplan.tracing.packages import stand_ins
from memplan.tracing.recorder import Recorder
from memplan.tracing.step import Trace, on_meta_batch, trace_run
from memplan.tracing.step_phases import StepPhases
from memplan.train.offload import PlainMover

NUM_STEPS = 2

_QUIET: dict[str, Any] = {
    "max_steps": NUM_STEPS,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "logging_nan_inf_filter": False,  # it looks at the loss, which has no value here
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "auto_find_batch_size": False,
    "torch_compile": False,
    "ignore_data_skip": True,
}
"""Arguments of a run that only steps."""


def trace_trainer(
    trainer: Any,
    batch: Any,
    *,
    device: str = "cuda",
    gpu: str | None = None,
    allocator: AllocatorSettings | None = None,
) -> Trace:
    """
    What two optimizer steps of this Trainer take, micro batches of a step included.

    The Trainer may be training already, as in a callback. Its model, optimizer and random states are as they were
    afterwards. Callbacks are not run, nothing is evaluated, logged or saved.

    Args:
        batch: a micro batch as the collator makes it; every one is taken to be like it.
        device: `cuda` or `cpu`: whose kernels the run would use.
        gpu: a card or size that the need is compared with.
        allocator: settings of PyTorch's caching allocator.

    Raises:
        TraceError: the run is spread over several processes or devices.
        Whatever the Trainer's code raises, as it is.
    """
    _check(trainer)
    models = models_of(trainer)
    optimizers = [] if trainer.optimizer is None else [unwrapped(trainer.optimizer)]
    kept = [dict(optimizer.__dict__) for optimizer in optimizers]
    half = trainer.accelerator.mixed_precision == "fp16"
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(_as_it_was(model))
        folder = stack.enter_context(TemporaryDirectory(prefix="memplan-"))
        stack.enter_context(apart())
        stack.enter_context(saved_by(HostMover() if device == "cuda" else PlainMover()))

        def run(recorder: Recorder, phases: StepPhases) -> None:
            stand_in = _stand_in(trainer, recorder, phases, batch, folder, device, half=half)
            if optimizers:
                stand_in.optimizer = optimizers[0]
            attention = getattr(getattr(trainer.model, "config", None), "_attn_implementation", None)
            with stand_ins(recorder, Job(model="step", attention=attention or "sdpa")):
                stand_in.train()
            recorder.mark("end", NUM_STEPS)

        try:
            return trace_run(
                run, models, optimizers, device=device, steps=NUM_STEPS, gpu=gpu, allocator=allocator
            )
        finally:
            for optimizer, attributes in zip(optimizers, kept):
                optimizer.__dict__.clear()
                optimizer.__dict__.update(attributes)


def _check(trainer: Any) -> None:
    from transformers import Trainer

    args, model = trainer.args, trainer.model
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if args.world_size > 1 or getattr(args, "n_gpu", 1) > 1 or len(devices) > 1:
        raise TraceError(
            "a Trainer is traced in one process with one device",
            hint="`memplan estimate --engine trace` plans DDP and FSDP2 from a job file",
        )
    kind = type(trainer)
    if kind._prepare_inputs is not Trainer._prepare_inputs:
        # Those of reinforcement learning generate there, token by token.
        raise TraceError(
            f"`{kind.__name__}` makes its batches while it trains, which is not followed",
            hint="`memplan.trace` traces a step that you write",
        )


def models_of(trainer: Any) -> dict[str, nn.Module]:
    """The model that trains, and others that the Trainer holds, such as a teacher, by prefix."""
    models: dict[str, nn.Module] = {"": trainer.model}
    inside = {id(module) for module in trainer.model.modules()} | {id(trainer.model_wrapped)}
    for name, value in vars(trainer).items():
        if isinstance(value, nn.Module) and id(value) not in inside:
            models[f"{name}."] = value
            inside |= {id(module) for module in value.modules()}
    return models


def _stand_in(
    trainer: Any, recorder: Recorder, phases: StepPhases, batch: Any, folder: str, device: str, *, half: bool
) -> Any:
    from transformers.trainer_callback import (
        CallbackHandler,
        DefaultFlowCallback,
        TrainerControl,
        TrainerState,
    )

    kind = type(trainer)
    stand_in: Any = object.__new__(type(kind.__name__, (_mixin(kind, device),), {}))
    vars(stand_in).update({name: _copied(value) for name, value in vars(trainer).items()})
    num_batches = trainer.args.gradient_accumulation_steps
    stand_in.args = _arguments(trainer, folder, half=half)
    stand_in._tracing = (recorder, phases, batch, num_batches)
    stand_in.state, stand_in.control = TrainerState(), TrainerControl()
    stand_in.callback_handler = CallbackHandler([DefaultFlowCallback()], trainer.model, None, None, None)
    stand_in.model_wrapped = trainer.model
    stand_in.model_init = stand_in.optimizer = stand_in.lr_scheduler = None
    stand_in._created_lr_scheduler = False
    if trainer.is_in_train:
        stand_in.neftune_noise_alpha = None  # it hangs on the model already
    stand_in.create_accelerator_and_postprocess()
    pretend_meta("float16" if half else None)
    accelerator = stand_in.accelerator
    if half:
        accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    prepare = accelerator.prepare_model
    accelerator.prepare_model = lambda module, **_: prepare(module, device_placement=False)
    if getattr(trainer.args, "activation_offloading", False) is True and device == "cuda":
        # TRL has told the head already to leave alone what it saves.
        stand_in.maybe_activation_offload_context = OffloadedActivations(
            recorder, trainer.model, streams=True
        )
    return stand_in


def _copied(value: Any) -> Any:
    """Plain containers anew, what is in them as it is: loops append to those that they find."""
    if isinstance(value, dict):
        fresh = copy.copy(value)
        for key, item in value.items():
            fresh[key] = _copied(item)
        return fresh
    return [_copied(item) for item in value] if type(value) is list else value


def _arguments(trainer: Any, folder: str, *, half: bool) -> Any:
    """The Trainer's arguments for a run on meta tensors that only steps."""
    given = trainer.args

    class OnMeta(type(given)):  # type: ignore[misc]
        @property
        def device(self) -> torch.device:
            return META

        @property
        def n_gpu(self) -> int:
            return 1

    args: Any = object.__new__(OnMeta)
    vars(args).update(vars(given))
    changed = _QUIET | {
        "output_dir": folder,
        "report_to": [],
        "gradient_accumulation_steps": min(given.gradient_accumulation_steps, MICRO_BATCHES),
    }
    if half:
        # accelerate refuses float16 on the CPU, where it believes to be until it is told otherwise.
        changed |= {"fp16": False, "bf16": True}
    if trainer.is_in_train:
        changed |= dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), False)
    vars(args).update({name: value for name, value in changed.items() if hasattr(given, name)})
    return args


def _mixin(kind: Any, device: str) -> Any:
    """The Trainer's class with what a run on meta tensors does otherwise."""

    class OnMeta(kind):
        def _move_model_to_device(self, *_: Any) -> None:
            """The model is where it is."""

        def get_train_dataloader(self) -> Any:
            recorder, _, batch, _ = self._tracing
            count = NUM_STEPS * self.args.gradient_accumulation_steps + 1
            return _Batches(recorder, batch, count, ahead=device == "cpu")

        def create_optimizer(self, *positional: Any, **options: Any) -> Any:
            exists = self.optimizer is not None
            optimizer = super().create_optimizer(*positional, **options)
            if not exists:
                self._tracing[0].watch(dict(self.model.named_parameters()), unwrapped(optimizer))
            return optimizer

        def get_batch_samples(self, *positional: Any, **options: Any) -> Any:
            recorder, phases, batch, num_batches = self._tracing
            phases.begin_step()
            batches, num_items = super().get_batch_samples(*positional, **options)
            held = _Held(batches)
            # Those that are not run are on the device as well.
            held.others = [on_meta_batch(recorder, batch) for _ in range(num_batches - len(batches))]
            return held, num_items

        def log(self, *positional: Any, **options: Any) -> None:
            """Of no use to anybody here."""

        def _save_checkpoint(self, *positional: Any, **options: Any) -> None:
            """Nothing was trained."""

        def floating_point_ops(self, *_: Any) -> int:
            return 0

    return OnMeta


class _Held(list[Any]):
    """The micro batches of a step that are run, and what is beside them."""

    others: list[Any]


class _Batches:
    """
    A data loader of one batch, over and over, on the device. `ahead`: accelerate's fetches a batch before it gives the
    one before, which on the CPU takes the memory that is counted.
    """

    def __init__(self, recorder: Recorder, batch: Any, length: int, *, ahead: bool) -> None:
        self.recorder, self.batch, self.ahead = recorder, batch, ahead
        self.dataset = [None] * length
        self.batch_size = 1

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        ready: list[Any] = []
        for index in range(len(self)):
            while len(ready) < 1 + (self.ahead and index + 1 < len(self)):
                ready.append(on_meta_batch(self.recorder, self.batch))
            current = ready.pop(0)
            yield current
            del current


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """What a Trainer sets on a model and its modules (hooks, flags, a wrapped `forward`) is undone afterwards."""
    owners: list[Any] = [*model.modules()]
    owners += {id(owner.config): owner.config for owner in owners if hasattr(owner, "config")}.values()
    before = [(owner, dict(vars(owner)), _contents(owner)) for owner in owners]
    try:
        yield
    finally:
        for owner, attributes, contents in before:
            vars(owner).clear()
            vars(owner).update(attributes)
            for container, content in contents:
                # The same object: handles of hooks refer to it.
                container.clear()
                container.update(content) if isinstance(container, dict) else container.extend(content)


def _contents(owner: Any) -> list[tuple[Any, Any]]:
    """What is changed in place: dicts of hooks, parameters, submodules, and lists."""
    return [(value, copy.copy(value)) for value in vars(owner).values() if isinstance(value, (dict, list))]
