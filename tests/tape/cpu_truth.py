"""What torch's CPU allocator really did in one training step of a job, and what the planner wrote for it."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from installed import installed_behaviour
from memplan.job.spec import Job
from memplan.model.config import architecture_from_config
from memplan.tape.writer import write_tape
from memplan.train.build import build_model
from memplan.train.data import MicroBatch
from memplan.train.loop import Loop
from memplan.train.optimizer import build_optimizer

SMALLEST_BYTES = 2048
"""Smaller storages are scalars, seeds and masks of the kernels."""


@dataclass
class FixedBatches:
    """The same unpadded tokens in every micro batch, as `memplan.train.data.Batches` hands them out."""

    input_ids: torch.Tensor
    packing: bool = False

    def lengths(self, step: int) -> list[list[int]]:
        return [[self.input_ids.shape[1]] * self.input_ids.shape[0]] * 2

    def num_targets(self, step: int) -> int:
        return (self.input_ids.shape[1] - 1) * self.input_ids.shape[0]

    def micro_batch(self, step: int, micro: int) -> MicroBatch:
        if not self.packing:
            return MicroBatch(self.input_ids, self.input_ids)
        # Two documents per row, as a tensor of its own per micro batch.
        length = self.input_ids.shape[1]
        positions = torch.arange(length) % (length // 2)
        return MicroBatch(self.input_ids, self.input_ids, positions.repeat(len(self.input_ids), 1))


def profiled_step(job: Job, config: dict) -> list[int]:
    """Signed bytes of every allocation and free of the second step, in order, above SMALLEST_BYTES."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    built = build_model(job, config, device, weights_path=None)
    optimizer = build_optimizer(job, built.trainable)
    ids = torch.randint(0, config["vocab_size"], (job.micro_batch_size, job.max_seq_len))
    batch = FixedBatches(ids, job.packing)
    loop = Loop(job, built, optimizer, batch, device)  # type: ignore[arg-type]
    loop.step(1)
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            loop.step(2)
    finally:
        gc.enable()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in events if abs(event.nbytes()) >= SMALLEST_BYTES]


def planned_step(job: Job, config: dict) -> list[int]:
    """The same of the planner's tape for the CPU."""
    architecture = architecture_from_config(config, name="tiny", source="test")
    behaviour = installed_behaviour(job)
    tape = write_tape(job, architecture, device="cpu", behaviour=behaviour).flatten()
    start = next(mark.event for mark in tape.marks if mark.step == 2)
    signed = [
        tape.sizes[event] if event > 0 else -tape.sizes[-event]
        for event in tape.events[start : tape.marks[-1].event]
    ]
    return [size for size in signed if abs(size) >= SMALLEST_BYTES]


def peak(signed: list[int]) -> int:
    """Highest running sum."""
    live = highest = 0
    for size in signed:
        live += size
        highest = max(highest, live)
    return highest
