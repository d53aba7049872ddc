"""
The steps that are recorded: the trainer's own loop, a plain script, or transformers' Trainer, on random tokens
of full length.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch

from memplan.errors import RunError
from memplan.job.spec import Job
from memplan.train.build import build_model
from memplan.train.data import job_batches
from memplan.train.group import join
from memplan.train.kernels import attention_kernel
from memplan.train.loop import Loop, seed_micro_batch
from memplan.train.optimizer import build_optimizer
from memplan.train.parallel import build_parallel, is_sharded
from memplan.train.samples import ID_BITS, START, Samples, SampleWriter


@dataclass(frozen=True)
class Observer:
    """Who is told what the steps do."""

    begin: Callable[[str, int], None]
    """(phase, step): a phase begins, and the one before it ends."""
    end_step: Callable[[int, float | None], None]
    """(step, loss): a step is over."""


def run_steps(
    job: Job,
    config: dict[str, Any],
    device: torch.device,
    samples: Samples,
    observer: Observer,
    *,
    steps: int,
) -> None:
    """
    Load the job's model with random weights and run its loop for `steps` optimizer steps.

    Raises:
        RunError: a combination that no loop here runs.
        ImportError, torch.OutOfMemoryError, RuntimeError: from libraries.
    """
    if job.world_size > 1:
        raise RunError(
            f"this job needs {job.world_size} GPUs, and a record is of one",
            hint="use `--set parallel.dp_shard=1 --set parallel.dp_replicate=1`",
        )
    if job.loop != "memplan" and is_sharded(job):
        raise RunError("sharding is recorded in our own loop", hint="use `--set loop=memplan`")
    loops = {"memplan": _memplan_loop, "script": _script_loop, "hf_trainer": _trainer_loop}
    observer.begin("load", 0)
    with attention_kernel(job.attention_kernel):
        loops[job.loop](job, config, device, samples, observer, steps)


def random_samples(job: Job, config: dict[str, Any], *, steps: int) -> Samples:
    """Tokens of `steps` optimizer steps, every sample `max_seq_len` long; raises RunError without a vocabulary."""
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise RunError("the model's config names no `vocab_size`", hint="add it to its config.json")
    count = job.micro_batch_size * job.gradient_accumulation_steps * steps
    generator = random.Random(job.train.seed)
    writer = SampleWriter()
    for _ in range(count):
        tokens = array("i", generator.choices(range(vocab_size), k=job.max_seq_len))
        tokens[0] |= START
        if job.packing:  # two documents per row: one alone would need no mask
            tokens[job.max_seq_len // 2] |= START
        writer.add(tokens)
    return writer.finish()


def _memplan_loop(
    job: Job, config: dict[str, Any], device: torch.device, samples: Samples, observer: Observer, steps: int
) -> None:
    """The trainer's; a strategy that shards cuts the model for a group of one process."""
    group = join(needs_group=is_sharded(job))
    try:
        parallel = build_parallel(job, config, group, weights_path=None)
        optimizer = build_optimizer(job, list(parallel.trainable.values()))
        batches = job_batches(job, samples)
        loop = Loop(job, parallel.built, optimizer, batches, device, parallel=parallel, begin=observer.begin)
        for step in range(1, steps + 1):
            observer.end_step(step, loop.step(step).loss)
    finally:
        group.leave()


def _script_loop(
    job: Job, config: dict[str, Any], device: torch.device, samples: Samples, observer: Observer, steps: int
) -> None:
    """What people write: the model gets the labels, and its output lives until the next one replaces it."""
    if job.method == "npt" or job.loss_form() != "full":
        raise RunError(
            "`loop: script` takes the loss that the model computes", hint="use `--set loop=memplan`"
        )
    built = build_model(job, config, device, weights_path=None)
    model: Any = built.model
    model.config.use_cache = True  # as transformers' configs have it
    optimizer = build_optimizer(job, built.trainable)
    batches = job_batches(job, samples)
    dtype = getattr(torch, job.autocast) if job.autocast else None
    for step in range(1, steps + 1):
        for micro in range(job.gradient_accumulation_steps):
            observer.begin("forward", step)
            seed_micro_batch(job.train.seed, step, micro)
            batch = batches.micro_batch(step, micro)
            input_ids, labels = batch.input_ids.to(device), batch.labels.to(device)
            del batch
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                output = model(input_ids=input_ids, labels=labels)
            loss = output.loss / job.gradient_accumulation_steps
            observer.begin("backward", step)
            loss.backward()
        observer.begin("optimizer_step", step)
        if job.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(built.trainable, job.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        observer.end_step(step, output.loss.item())


def _trainer_loop(
    job: Job, config: dict[str, Any], device: torch.device, samples: Samples, observer: Observer, steps: int
) -> None:
    """transformers' Trainer with its defaults, told when its phases begin by a few overridden methods."""
    from memplan.hf.arguments import check_trainer, training_arguments
    from memplan.hf.trainer import collate, flattened, observed_trainer

    check_trainer(job)
    # Checkpointing is switched on by the Trainer, as those who use it do; it knows no `selective`.
    own = job.activation_checkpointing == "selective"
    built = build_model(
        job if own else job.replace(activation_checkpointing="none"), config, device, weights_path=None
    )
    observed: Any = observed_trainer(observer.begin, lambda step: observer.end_step(step, None))
    with TemporaryDirectory(prefix="memplan-") as folder:
        trainer = observed(
            model=built.model,
            args=training_arguments(job, folder, steps=steps, use_cpu=device.type == "cpu"),
            train_dataset=_rows(samples),
            data_collator=flattened if job.padding_free else collate,
        )
        trainer.train()


def _rows(samples: Samples) -> list[dict[str, list[int]]]:
    """Samples as rows of a data set."""
    return [{"input_ids": [token & ID_BITS for token in samples[index]]} for index in range(len(samples))]
