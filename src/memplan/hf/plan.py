"""The plan of a run of transformers' Trainer, from the objects that its script has made."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from memplan.budget.estimate import estimate_written
from memplan.budget.result import Result
from memplan.errors import JobError, ModelError, TraceError, UnknownModel
from memplan.gpu.capacity import Capacity
from memplan.hf.batch import Batch, full_batch, largest_batch
from memplan.hf.losses import OF_SFT, is_sft_trainer, read_liger, read_sft_loss
from memplan.hf.ranks import read_ranks, sizes_of
from memplan.hf.reading import Reading, read_arguments, read_environment, read_model, read_trainer
from memplan.job.spec import AllocatorSettings, Job
from memplan.preflight.verdict import judge
from memplan.render.answer import Answer
from memplan.render.words import headline, peak_moment
from memplan.tape.behaviour import Behaviour
from memplan.units import format_bytes

ENGINES = ("auto", "shape", "trace")


@dataclass(frozen=True)
class TrainerPlan(Answer):
    """What a Trainer's run takes; `print` it for the screen of `memplan estimate`."""

    batch: str
    """The micro batch that was planned, in words."""
    reasons: tuple[str, ...]
    """Why the run was traced: what a job has no words for."""
    notes: tuple[str, ...]
    """What is left out, and what was taken for granted."""
    seconds: float

    def lines(self) -> list[str]:
        """One line with the answer and one with how it was found."""
        on_cpu = self.result.engine["device"] == "cpu"
        state, reason = headline(self.result)
        if on_cpu:
            state, reason = "needs", f"{format_bytes(self.peak_bytes)} of RAM for tensors"
        answer = f"{state}: {reason}" if self.result.verdict is not None else f"{state} {reason}"
        engine = "traced" if self.result.engine["name"] == "trace" else "planned"
        because = f" (a job has no words for: {'; '.join(self.reasons)})" if self.reasons else ""
        found = f"{engine} in {self.seconds:.1f} s for {self.batch}{because}"
        return [
            f"memplan: {answer}; the peak is {peak_moment(self.result.peak)}",
            "memplan: " + "; ".join([found, *self.notes]),
        ]


def preflight(
    subject: Any,
    model: Any = None,
    *,
    peft_config: Any = None,
    max_seq_len: int | None = None,
    gpu: str | None = None,
    engine: str = "auto",
) -> TrainerPlan:
    """
    What a run of transformers' Trainer takes, and whether it fits the GPU at hand. Nothing is trained.

    Args:
        subject: a Trainer (TRL's and one's own included), or the TrainingArguments of one that is still to be built.
        model: with arguments alone: a transformers model (also one on the meta device) or its config.
        peft_config: with arguments alone: the LoraConfig of the adapters that the model will get.
        max_seq_len: tokens of the longest sequence. With a Trainer the longest rows of its data are taken.
        gpu: a card or size to compare with, as in `memplan estimate --gpu`; None: the GPU that torch would use.
        engine: `shape` plans the run as a job, `trace` runs the Trainer on meta tensors, `auto` traces where a job has
            no words for something.

    Raises:
        TraceError: a trace is needed and cannot be had.
        DataError: the longest row of the data cannot be known; give `max_seq_len`.
        JobError, UnknownModel, ModelError: with `engine="shape"` or arguments alone, what cannot be planned.
    """
    begin = time.perf_counter()
    if engine not in ENGINES:
        raise JobError(f"`engine` is `{engine}`", hint="use `auto`, `shape` or `trace`")
    check_options(max_seq_len, gpu)
    if not hasattr(subject, "callback_handler") and not hasattr(subject, "per_device_train_batch_size"):
        raise JobError(
            f"`preflight` was given an object of {type(subject).__name__}, which is neither a Trainer nor "
            "TrainingArguments",
            hint="give the Trainer, or the arguments and the model",
        )
    trainer = subject if hasattr(subject, "callback_handler") else None
    if trainer is None and not hasattr(getattr(model, "config", model), "to_dict"):
        raise JobError(
            f"with arguments alone `model` has to be a transformers model or its config, not {_kind(model)}",
            hint="give `AutoConfig.from_pretrained(...)`, or the Trainer in place of the arguments",
        )
    args = subject if trainer is None else subject.args
    device = "cpu" if args.device.type == "cpu" and gpu is None else "cuda"
    card = card_name(gpu, device)
    reading = Reading()
    if device != args.device.type:
        reading.notes.append(f"planned as on CUDA, not on {args.device.type}")
    read_arguments(reading, args, device=device)
    read_ranks(reading, args, trainer)
    allocator = read_environment(reading)
    if trainer is not None:
        batch = largest_batch(trainer, max_seq_len)
        is_sft = is_sft_trainer(type(trainer)) and read_sft_loss(reading, trainer, device=device)
        read_trainer(reading, trainer, OF_SFT if is_sft else ())
        config = read_model(reading, trainer.model)
        model = trainer.model
    else:
        batch = _batch_of(reading, args, max_seq_len)
        config = read_model(reading, model, peft_config)
        if not hasattr(model, "parameters"):
            reading.notes.append("a config names no head: its language model is planned")
    read_liger(reading, args, config.get("model_type", ""))
    _read_batch(reading, batch)
    if engine != "trace":
        try:
            result = _as_job(reading, config, batch, model, device, card)
        except (JobError, UnknownModel, ModelError) as error:
            if engine == "shape":
                raise
            reading.unknown.append(" ".join(error.message.removeprefix("`--optim`: ").split()))
            result = None
    else:
        result = None
    if result is None:
        if engine == "shape":
            raise JobError(
                f"a job has no words for: {'; '.join(dict.fromkeys(reading.unknown))}",
                hint='`engine="auto"` runs the Trainer on meta tensors',
            )
        if args.world_size > 1 and reading.unknown:
            raise TraceError(
                f"a job has no words for: {'; '.join(reading.unknown)}; and runs of several processes are not traced",
                hint="`memplan estimate` plans DDP and FSDP2 from a job file",
            )
        result = _traced(reading, trainer, config, batch, allocator, device, card)
    reasons = tuple(dict.fromkeys(reading.unknown)) if result.engine["name"] == "trace" else ()
    capacity = _capacity(gpu, device, result.peak.non_torch_bytes)
    if capacity is not None:
        margin = None if result.job is None else result.job.margin
        result = replace(result, capacity=capacity, verdict=judge(result, capacity, margin))
    notes = (*batch.notes, *reading.notes)
    result = result.with_warnings(*notes)
    return TrainerPlan(result, str(batch), reasons, notes, time.perf_counter() - begin)


def _kind(model: Any) -> str:
    return "None" if model is None else f"an object of {type(model).__name__}"


def check_options(max_seq_len: Any, gpu: Any) -> None:
    """Raise JobError where a length is no whole number from 1 on, or a card is not named."""
    is_whole = isinstance(max_seq_len, int) and not isinstance(max_seq_len, bool)
    if max_seq_len is not None and not (is_whole and max_seq_len > 0):
        raise JobError(
            f"`max_seq_len` is `{max_seq_len}`", hint="give the tokens of the longest sequence, such as 2048"
        )
    if gpu is not None and not isinstance(gpu, str):
        raise JobError(f"`gpu` is `{gpu}`", hint='give a card or a size as text, such as "24GB"')


def _batch_of(reading: Reading, args: Any, max_seq_len: int | None) -> Batch:
    length = max_seq_len or getattr(args, "max_length", None)
    if length is None:
        raise JobError(
            "arguments alone do not say how long sequences are", hint="give `max_seq_len`, or the Trainer"
        )
    if any(kind.__name__ == "SFTConfig" for kind in type(args).__mro__):
        reading.unknown.append("the loss of TRL's SFTTrainer")
    return full_batch(args.per_device_train_batch_size, length)


def _read_batch(reading: Reading, batch: Batch) -> None:
    shape = batch.shape
    others = sorted(batch.tensors.keys() - {"input_ids", "labels", "attention_mask"})
    if shape is None:
        reading.unknown.append("a batch without `input_ids`")
        return
    if others:
        reading.unknown.append(f"`{others[0]}` in the batch")
    if "labels" not in batch.tensors:
        reading.unknown.append("a batch without `labels`")
    reading.fields |= {"micro_batch_size": shape[0], "max_seq_len": shape[1]}


def _as_job(
    reading: Reading, config: dict[str, Any], batch: Batch, model: Any, device: str, card: str | None
) -> Result | None:
    """The result of the job that was read; None where it does not say all."""
    from memplan.model.config import architecture_from_config

    if reading.unknown:
        return None
    job = reading.job(card)
    architecture = architecture_from_config(config, name=job.model, source="the model's config")
    behaviour = replace(
        Behaviour.for_model(job, architecture.family),
        padding_mask=batch.is_padded,
        mask_in_batch="attention_mask" in batch.tensors,
    )
    if reading.has_flat_parameters:
        if job.method != "full" and job.autocast is not None:
            reading.unknown.append("adapters under FSDP1 without `use_orig_params`")
            return None
        behaviour = replace(behaviour, original_parameters=False)
    if reading.finds_unused is not None:
        behaviour = replace(behaviour, clones_output=reading.finds_unused)
    result = estimate_written(job, architecture, device=device, behaviour=behaviour)[1]
    _check_counts(reading, result, job, model)
    return None if reading.unknown else result


def _check_counts(reading: Reading, result: Result, job: Job, model: Any) -> None:
    """A model that was changed after it was built is not the one that its config describes."""
    if not hasattr(model, "parameters") or (job.method != "full" and not hasattr(model, "peft_config")):
        return
    assert result.parameters is not None
    sizes = sizes_of(model)
    found = {"trained": sum(size for size, trains in sizes if trains)}
    planned = {"trained": result.parameters.trainable}
    if job.method != "qlora":  # two weights are one element there
        found["all"], planned["all"] = (
            sum(size for size, _ in sizes),
            result.parameters.total,
        )
    if found != planned:
        reading.unknown.append("a model that has other parameters than its config and adapters say")


def _traced(
    reading: Reading,
    trainer: Any,
    config: dict[str, Any],
    batch: Batch,
    allocator: AllocatorSettings,
    device: str,
    card: str | None,
) -> Result:
    if trainer is not None:
        from memplan.tracing.hf_trainer import trace_trainer

        return trace_trainer(trainer, batch.tensors, device=device, gpu=card, allocator=allocator).result
    from memplan.tracing.estimate import estimate_traced

    try:
        job = reading.job(card)
    except JobError:
        job = None
    # What keeps an engine without a Trainer from an answer is all but an architecture without a program.
    if job is None or any("no program" not in reason for reason in reading.unknown):
        raise TraceError(
            "arguments alone do not say all: " + "; ".join(reading.unknown),
            hint="build the Trainer and give it to `memplan.hf.preflight`",
        )
    return estimate_traced(job, config, device=device)[1]


def card_name(gpu: str | None, device: str) -> str | None:
    """The catalogue's name of the card that is meant; None for one that it does not have."""
    from memplan.gpu.catalogue import match_gpu

    if device == "cpu":
        return None
    name = gpu
    if gpu is None:
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    profile = None if name is None else match_gpu(name)
    return None if profile is None else profile.name


def _capacity(gpu: str | None, device: str, outside_bytes: int) -> Capacity | None:
    """The card that was named, or what this process can get of its GPU now; None without either."""
    if device == "cpu":
        return None
    if gpu is not None:
        from memplan.gpu.capacity import resolve_capacity

        return resolve_capacity(gpu)
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    own = (
        torch.cuda.memory_reserved() + outside_bytes
    )  # the context is there already, and is part of the need
    usable = min(total, free + own)
    return Capacity(
        gpu=torch.cuda.get_device_name(),
        total_bytes=total,
        usable_bytes=usable,
        used_by_others_bytes=total - usable,
        source="torch: free now, and what this process holds",
    )
