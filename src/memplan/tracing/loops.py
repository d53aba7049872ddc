"""The training loops, run on meta tensors: memplan's own, transformers' Trainer, and a plain script."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from memplan.job.spec import Job
from memplan.tape.behaviour import Behaviour
from memplan.tape.low_bit import LOW_BIT
from memplan.tape.multiprocessors import multiprocessors
from memplan.tracing.build import META, MetaModel
from memplan.tracing.hf_loop import MICRO_BATCHES, run_trainer
from memplan.tracing.low_bit import LowBitAdamW
from memplan.tracing.recorder import Recorder
from memplan.tracing.sharded import finish_reductions
from memplan.train.build import Built
from memplan.train.data import Batches
from memplan.train.group import Group
from memplan.train.host_optimizer import HostCopies
from memplan.train.loop import Loop
from memplan.train.offload import Mover
from memplan.train.optimizer import build_optimizer, parameter_groups
from memplan.train.parallel import Parallel
from memplan.train.samples import START, Samples, count_targets


def full_batches(job: Job) -> Batches:
    """
    Batches of the job's shape, of all ranks: every row of `max_seq_len` tokens, all zeros. Packed rows hold two
    documents each.
    """
    length, num_rows = job.max_seq_len, job.micro_batch_size
    row = [START, *[0] * (length - 1)]
    if job.packing:
        row[length // 2] = START
    samples = Samples(
        tokens=row * num_rows,
        offsets=[index * length for index in range(num_rows + 1)],
        targets=[count_targets(row)] * num_rows,
        digest="",
    )
    return Batches(
        samples,
        job.micro_batch_size,
        job.gradient_accumulation_steps * job.world_size,
        job.train.seed,
        packing=job.packing,
        flatten=job.packing and job.attention == "flash_attention_2",
        longest_first=False,
    )


def run_loop(
    job: Job, meta: MetaModel, group: Group, recorder: Recorder, num_steps: int, mover: Mover
) -> Any:
    """
    Optimizer steps 1 to `num_steps` of the loop that the job names, recorded; `mover` is for loops that offload inputs
    of blocks themselves. Returns what the loop still holds.
    """
    if job.loop == "hf_trainer":
        run_trainer(job, meta.built.model, recorder, num_steps, mover)
        return None
    built, held = meta.built, None
    parallel = Parallel(job, built, group, root=meta.root)
    finish_reductions(parallel.module)
    if job.npt.stream == "curriculum":  # what it takes at most: that of its first steps
        job = replace(job, npt=replace(job.npt, stream="teacher"))
    job = replace(job, gradient_accumulation_steps=min(job.gradient_accumulation_steps, MICRO_BATCHES))
    stepped = parallel.trainable
    copies = None
    if recorder.host is not None and not job.offload.params:
        copies = HostCopies(stepped, recorder.host.allocate)
        stepped = copies.parameters
    if job.optimizer in LOW_BIT:
        groups = parameter_groups(list(stepped.values()), job.train.weight_decay)
        optimizer: Any = LowBitAdamW(
            groups, optimizer=job.optimizer, device=multiprocessors(job.gpu), lr=job.train.learning_rate
        )
    else:
        optimizer = build_optimizer(job, list(stepped.values()))
    if copies is not None:
        copies.follow(optimizer)
    named = {
        name.removeprefix("base_model.model."): parameter for name, parameter in parallel.trainable.items()
    }
    recorder.watch(named, optimizer)
    if recorder.host is not None and (copies is not None or job.method != "npt"):
        recorder.host.follow(optimizer)
    if job.loop == "memplan":
        loop = Loop(job, built, optimizer, full_batches(job), META, parallel=parallel, begin=recorder.mark)
        for step in range(1, num_steps + 1):
            loop.step(step)
    else:
        held = _run_script(job, built, optimizer, recorder, num_steps)
    recorder.mark("end", num_steps)
    return held


def _run_script(job: Job, built: Built, optimizer: Any, recorder: Recorder, num_steps: int) -> Any:
    """A loop as tutorials write it: the model's output is held until the next one takes its place."""
    batches = full_batches(replace(job, packing=False))  # documents in a row are one row to it
    clip = job.train.max_grad_norm
    if Behaviour.for_job(job).input_gradients:
        built.model.enable_input_require_grads()
    for step in range(1, num_steps + 1):
        for micro in range(job.gradient_accumulation_steps):
            recorder.mark("forward", step)
            batch = batches.micro_batch(step, micro).to(META)
            with torch.autocast("cuda", dtype=_dtype(job.autocast), enabled=job.autocast is not None):
                output = built.model(input_ids=batch.input_ids, labels=batch.labels)
            recorder.mark("backward", step)
            output.loss.backward()
        recorder.mark("optimizer_step", step)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(built.trainable, clip)
        optimizer.step()
        optimizer.zero_grad()
    return batch, output


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
