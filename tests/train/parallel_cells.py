"""
Work for several processes at once: many small trainings in one process group, since starting processes is what takes
time. `python parallel_cells.py ROOT` under `Workers` runs every cell, and leaves in ROOT what the tests compare.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measured_cells import GRID, measure
from tiny_runs import GPT2, LLAMA, prepared, tiny_job
from torch import Tensor
from torch.distributed.tensor import DTensor

from memplan.job.spec import Job
from memplan.train.data import Batches
from memplan.train.documents import Reader
from memplan.train.group import ALONE, Group, end_process, join
from memplan.train.loop import Loop
from memplan.train.optimizer import build_optimizer
from memplan.train.parallel import build_parallel
from memplan.train.run import Run
from memplan.train.samples import Samples, build_samples
from memplan.train.sources import read_source
from memplan.train.speech import speak
from memplan.train.tokens import byte_tokenizer

NUM_STEPS = 3
STRATEGIES: dict[str, dict[str, Any]] = {
    "DDP": {"parallel.dp_replicate": 2},
    "FULL_SHARD": {"parallel.strategy": "FULL_SHARD", "parallel.dp_shard": 2},
    "SHARD_GRAD_OP": {"parallel.strategy": "SHARD_GRAD_OP", "parallel.dp_shard": 2},
    "HYBRID_SHARD": {"parallel.strategy": "HYBRID_SHARD", "parallel.dp_replicate": 2},
    "offload": {"parallel.strategy": "FULL_SHARD", "parallel.dp_shard": 2, "offload.params": True},
}
PRECISIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("lora", "bfloat16"): {"dtype": "bfloat16"},
    ("full", "bfloat16"): {"autocast": "bfloat16"},
    ("npt", "bfloat16"): {"dtype": "bfloat16"},
    ("npt", "float16"): {"dtype": "float16"},
    ("npt", "4 bits"): {"npt.quantized_base": True},
    ("qlora", "bfloat16"): {"dtype": "bfloat16"},
    ("lora", "copies"): {"lora.modules_to_save": ("embed_tokens", "lm_head")},
}


@dataclass(frozen=True)
class Cell:
    """One training."""

    method: str
    strategy: str
    checkpointing: str
    precision: str

    @property
    def reference(self) -> Cell:
        """The same training in one process."""
        return Cell(self.method, "alone", self.checkpointing, self.precision)

    @property
    def file(self) -> str:
        return f"{self.method}-{self.strategy}-{self.checkpointing}-{self.precision}.pt"

    def job(self, root: Path) -> Job:
        """With a global batch of 8 sequences of unequal lengths, however many ranks there are."""
        changes = PRECISIONS.get((self.method, self.precision), {}) | STRATEGIES.get(self.strategy, {})
        llama = LLAMA | {"num_hidden_layers": 2, "tie_word_embeddings": self.precision == "copies"}
        job = tiny_job(
            root,
            self.method,
            config=GPT2 | {"n_layer": 2} if self.method == "full" else llama,
            activation_checkpointing=self.checkpointing,
            gradient_accumulation_steps=4 if self.strategy == "alone" else 2,
            loss="chunked" if self.checkpointing == "full" else "full",
            lora__dropout=0.1,
            train__max_grad_norm=1.0,
        )
        return job.replace(**changes)


def cells() -> list[Cell]:
    """
    Every strategy with and without activation checkpointing and in both precisions; all four of these together with
    FULL_SHARD only, and of NPT a float16 and a 4-bit base; LoRA beside trained copies of tied embeddings and head with
    DDP too. QLoRA: once whole, once sharded. NPT has no activation
    checkpointing: its blocks run their backward pass in forward.
    """
    found = []
    for method, strategy in itertools.product(("lora", "full", "npt", "qlora"), STRATEGIES):
        kinds = [("none", "float32"), ("full", "bfloat16")]
        if method == "qlora":
            kinds = {"DDP": kinds[:1], "FULL_SHARD": kinds[1:]}.get(strategy, [])
        elif strategy == "FULL_SHARD":
            kinds += [("full", "float32"), ("none", "bfloat16")]
            kinds += [("none", "float16"), ("none", "4 bits")] if method == "npt" else []
        elif strategy == "offload":
            kinds = kinds[:1]
        if method == "lora" and strategy in ("DDP", "FULL_SHARD"):
            kinds.append(("full", "copies"))
        kept = {
            ("none" if method == "npt" else checkpointing, precision) for checkpointing, precision in kinds
        }
        found += [
            Cell(method, strategy, checkpointing, precision) for checkpointing, precision in sorted(kept)
        ]
    return found


def train(job: Job, group: Group = ALONE) -> dict[str, Any]:
    """Losses of a few steps, and the whole gradients of the first."""
    torch.set_num_threads(1)
    parallel = build_parallel(job, _config(job), group, weights_path=None)
    optimizer = build_optimizer(job, list(parallel.trainable.values()))
    num_micro_batches = job.gradient_accumulation_steps * group.world_size
    batches = Batches(_samples(job), job.micro_batch_size, num_micro_batches, job.train.seed)
    gradients: dict[str, Tensor] = {}

    def keep_gradients(phase: str, step: int) -> None:
        if (phase, step) == ("optimizer_step", 1):
            gradients.update({name: _whole(parameter.grad) for name, parameter in parallel.trainable.items()})

    loop = Loop(
        job, parallel.built, optimizer, batches, group.device, parallel=parallel, begin=keep_gradients
    )
    losses = [loop.step(step).loss for step in range(1, NUM_STEPS + 1)]
    losses.append(loop.evaluate(batches, NUM_STEPS).loss)
    return {"losses": losses, "gradients": gradients}


def _config(job: Job) -> dict[str, Any]:
    from memplan.model import resolve_config

    return resolve_config(job.model).config


def _samples(job: Job) -> Samples:
    tokenizer = byte_tokenizer(260)
    rows = read_source(str(job.data.train), resolve=Path, split="train")
    documents = Reader(job.data, tokenizer.render).documents(rows)
    return build_samples(documents, tokenizer.tokenize, max_seq_len=job.max_seq_len, packing=False)


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    # A copy: clipping works in place.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def resumable_job(root: Path, name: str, method: str = "lora", strategy: str = "FULL_SHARD") -> Job:
    """A run of six steps in `root`/`name`, with dropout and copies of embeddings and head, that saves every second."""
    return tiny_job(
        root,
        method,
        config=LLAMA | {"num_hidden_layers": 2},
        gradient_accumulation_steps=4 if strategy == "alone" else 2,
        lora__dropout=0.1,
        lora__modules_to_save=("embed_tokens", "lm_head"),
        train__max_steps=6,
        train__save_every=2,
        train__sample_prompts=1,
        train__sample_tokens=3,
        train__output_dir=str(root / name),
    ).replace(**STRATEGIES.get(strategy, {}), **{"data.eval": str(root / "train.jsonl")})


def run_together(
    group: Group, *which: Any, resume: bool = False, fails_in: int | None = None, strategy: str = "FULL_SHARD"
) -> None:
    """What the worker does, on every rank; `fails_in` a step every rank stops before the optimizer steps."""
    made = resumable_job(*which, strategy=strategy) if group.is_first else None
    if made is not None:
        prepared(made)
    job = group.collect(made)[0]
    folder = Path(job.train.output_dir)

    def fail(phase: str, step: int) -> None:
        if (phase, step) == ("optimizer_step", fails_in):
            raise KeyError("pulled the plug")

    run = Run(folder, job, resume=resume, hook=fail, group=group)
    with suppress(KeyError):
        run.execute()
    run.stop_measuring()
    if group.is_first:
        run.finish("completed")


def main(root: Path) -> None:
    """Every cell and every run, on every rank."""
    torch.set_num_threads(1)
    group = join()
    if not group.is_first:
        speak(prefix=None)
    for cell in cells():
        results = train(cell.job(root / f"rank-{group.rank}"), group)
        if group.is_first:
            torch.save(results, root / cell.file)
    measured = {
        cell.name: measure(cell.job(root / f"rank-{group.rank}"), group) for cell in GRID if not cell.is_alone
    }
    (root / f"rank-{group.rank}" / "measured.json").write_text(json.dumps(measured))
    runs = root / "runs"
    run_together(group, runs, "whole")
    run_together(group, runs, "resumed", fails_in=5)
    if group.is_first:
        shutil.copytree(runs / "resumed", runs / "changed")
    run_together(group, runs, "resumed", resume=True)
    run_together(group, runs, "changed", resume=True, strategy="DDP")
    run_together(group, runs, "full", "full")
    group.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
