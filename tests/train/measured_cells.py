"""
Trainings whose measured peaks are compared with the plan: every strategy and method, with and without activation
checkpointing, the loss whole and in chunks. Every sample fills `max_seq_len`, as the plan assumes.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_runs import LLAMA, tiny_job

from memplan.budget.estimate import estimate
from memplan.job.spec import Job
from memplan.model import resolve_config, resolve_model
from memplan.train.data import Batches
from memplan.train.documents import Reader
from memplan.train.group import ALONE, Group
from memplan.train.loop import Loop
from memplan.train.measure import CpuMeter
from memplan.train.optimizer import build_optimizer
from memplan.train.parallel import build_parallel
from memplan.train.record import highest_by_phase
from memplan.train.report import highest_planned
from memplan.train.samples import build_samples
from memplan.train.sources import read_source
from memplan.train.tokens import byte_tokenizer

NUM_STEPS = 2
BOTH = "embed_tokens lm_head"
SMALL = LLAMA | {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512, "num_key_value_heads": 2,
}  # fmt: skip
STRATEGIES: dict[str, dict[str, Any]] = {
    "alone": {},
    "DDP": {"parallel.dp_replicate": 2},
    "SHARD_GRAD_OP": {"parallel.strategy": "SHARD_GRAD_OP", "parallel.dp_shard": 2},
    "FULL_SHARD": {"parallel.strategy": "FULL_SHARD", "parallel.dp_shard": 2},
    "HYBRID_SHARD 2x1": {"parallel.strategy": "HYBRID_SHARD", "parallel.dp_replicate": 2},
    "HYBRID_SHARD 1x2": {"parallel.strategy": "HYBRID_SHARD", "parallel.dp_shard": 2},
    "offload": {"parallel.strategy": "FULL_SHARD", "parallel.dp_shard": 2, "offload.params": True},
}


@dataclass(frozen=True)
class Measured:
    """One training."""

    strategy: str
    method: str
    checkpointing: str
    loss: str
    dtype: str = "float32"
    attention: str = "sdpa"
    saved: str = ""
    """`lora.modules_to_save`, with spaces between the names."""

    @property
    def name(self) -> str:
        return " ".join(filter(None, vars(self).values()))

    @property
    def is_alone(self) -> bool:
        return self.strategy == "alone"

    def job(self, root: Path) -> Job:
        """Two micro batches of two sequences for each rank."""
        job = tiny_job(
            root,
            self.method,
            config=SMALL,
            dtype=self.dtype,
            activation_checkpointing=self.checkpointing,
            loss=self.loss,
            attention=self.attention,
            max_seq_len=64,
            train__max_grad_norm=1.0,
            lora__modules_to_save=tuple(self.saved.split()),
        )
        Path(str(job.data.train)).write_text(('{"text": "' + "All of it counts. " * 9 + '"}\n') * 8)
        return job.replace(**STRATEGIES[self.strategy], **{"data.eval": job.data.train})


GRID = [
    Measured("alone", "full", "none", "full"),
    Measured("alone", "lora", "full", "chunked", "bfloat16"),
    Measured("alone", "qlora", "selective", "full"),
    Measured("alone", "npt", "none", "full"),
    Measured("alone", "npt", "none", "full", "float16", "eager"),
    Measured("DDP", "full", "full", "chunked"),
    Measured("DDP", "lora", "none", "full", "bfloat16"),
    Measured("DDP", "qlora", "full", "chunked"),
    Measured("DDP", "npt", "none", "full"),
    Measured("SHARD_GRAD_OP", "full", "none", "chunked"),
    Measured("SHARD_GRAD_OP", "lora", "full", "full"),
    Measured("FULL_SHARD", "full", "none", "full"),
    Measured("FULL_SHARD", "lora", "full", "chunked", "bfloat16"),
    Measured("FULL_SHARD", "qlora", "full", "full", "bfloat16"),
    Measured("FULL_SHARD", "npt", "none", "full"),
    Measured("HYBRID_SHARD 2x1", "lora", "none", "chunked"),
    Measured("HYBRID_SHARD 1x2", "full", "full", "full", "bfloat16"),
    Measured("offload", "lora", "full", "full"),
    Measured("alone", "lora", "none", "full", "bfloat16", saved=BOTH),
    Measured("alone", "qlora", "full", "chunked", saved=BOTH),
    Measured("DDP", "lora", "full", "chunked", "bfloat16", saved=BOTH),
    Measured("FULL_SHARD", "qlora", "none", "full", "bfloat16", saved=BOTH),
    Measured("SHARD_GRAD_OP", "lora", "full", "chunked", saved="lm_head"),
    Measured("offload", "lora", "full", "full", saved="embed_tokens"),
]


def measure(job: Job, group: Group = ALONE) -> dict[str, int]:
    """Peaks of the phases, as measured on this rank."""
    torch.set_num_threads(1)
    gc.collect()
    meter = CpuMeter(NUM_STEPS)
    meter.begin("load", 0)
    parallel = build_parallel(job, resolve_config(job.model).config, group, weights_path=None)
    optimizer = build_optimizer(job, list(parallel.trainable.values()))
    loop = Loop(
        job, parallel.built, optimizer, _batches(job), group.device, parallel=parallel, begin=meter.begin
    )
    meter.adopt(parallel.built.model)
    for step in range(1, NUM_STEPS + 1):
        loop.step(step)
        if step == NUM_STEPS:
            loop.evaluate(_batches(job), step)
        meter.end_step(step)
    return {phase: peak.allocated_peak_bytes for phase, peak in highest_by_phase(meter.peaks()).items()}


def planned(job: Job) -> dict[str, int]:
    """Peaks of the phases, as planned for every rank."""
    plan = estimate(job, resolve_model(job.model), device="cpu")
    return {line.phase: line.allocated_peak_bytes for line in highest_planned(plan)}


def _batches(job: Job) -> Batches:
    tokenizer = byte_tokenizer(512)
    rows = read_source(str(job.data.train), resolve=Path, split="train")
    documents = Reader(job.data, tokenizer.render).documents(rows)
    samples = build_samples(documents, tokenizer.tokenize, max_seq_len=job.max_seq_len, packing=False)
    return Batches(
        samples, job.micro_batch_size, job.gradient_accumulation_steps * job.world_size, job.train.seed
    )
