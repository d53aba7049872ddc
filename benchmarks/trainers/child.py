"""
One trainer in a process of its own.

Before every optimizer step it waits until it is told to go on, so that several trainers take turns step by step. What
is timed lies between two waits: data, forward, backward, optimizer, logging.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from memplan.job.spec import Job
from memplan.train.group import find_device
from memplan.train.measure import Meter, make_meter
from memplan.train.output_folder import JOB_FILE, read_job
from memplan.train.record import Record, read_metrics_lines
from memplan.train.samples import ID_BITS

RESULT, LOG = "result.json", "log.txt"


@dataclass
class Outcome:
    """What one trainer did, by optimizer step."""

    losses: list[float]
    tokens: list[int]
    """That the loss was taken on."""
    cpu_seconds: list[float]
    wall_seconds: list[float]
    peak_bytes: int
    """The most that was allocated at once during steps, weights included."""


class Turns:
    """Waits for its turn before a step, and takes the time of what lies between two of them."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self.cpu_seconds: list[float] = []
        self.wall_seconds: list[float] = []
        self._began: tuple[float, float] | None = None

    def next(self) -> None:
        """A step is about to begin; the one before it is over."""
        self.end()
        self._wait()
        self._began = time.process_time(), time.perf_counter()

    def end(self) -> None:
        """The step at hand is over."""
        if self._began is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.cpu_seconds.append(time.process_time() - self._began[0])
            self.wall_seconds.append(time.perf_counter() - self._began[1])
            self._began = None


def train_memplan(folder: Path, turns: Turns) -> Outcome:
    """All of `memplan train`'s worker."""
    from memplan.train.worker import run_job

    last = 0

    def hook(phase: str, step: int) -> None:
        nonlocal last
        if step > last:
            last = step
            turns.next()

    code = run_job(folder, hook=hook)
    turns.end()
    record = Record.read(folder)
    if code != 0 or record is None:
        raise SystemExit(code or 1)
    phases = record.fields["measured"]["phases"]
    peak_bytes = max(phase["allocated_peak_bytes"] for phase in phases if phase["step"] > 0)
    lines = list(read_metrics_lines(folder))
    losses, tokens = [line["loss"] for line in lines], [line["tokens"] for line in lines]
    return Outcome(losses, tokens, turns.cpu_seconds, turns.wall_seconds, peak_bytes)


def rows_in_order(job: Job) -> tuple[list[dict[str, list[int]]], list[int], Any]:
    """
    The samples as memplan's trainer takes them, one after the other; the tokens of each step that the loss is taken
    on; and the tokenizer of transformers.
    """
    from transformers import AutoTokenizer

    from memplan.train.data import job_batches
    from memplan.train.documents import Reader
    from memplan.train.samples import build_samples
    from memplan.train.sources import read_source
    from memplan.train.tokens import load_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ours = load_tokenizer(job.model, Path(job.model), weights="pretrained", vocab_size=len(tokenizer))
    assert job.data.train is not None
    documents = Reader(job.data, ours.render).documents(
        read_source(job.data.train, resolve=Path, split="train")
    )
    samples = build_samples(documents, ours.tokenize, max_seq_len=job.max_seq_len, packing=False)
    batches = job_batches(job, samples)
    steps = range(1, job.train.max_steps + 1)
    indices = [index for step in steps for index in batches.sample_indices(step)]
    rows = [{"input_ids": [token & ID_BITS for token in samples[index]]} for index in indices]
    return rows, [batches.num_targets(step) for step in steps], tokenizer


def build_transformers_model(job: Job, device: torch.device) -> Any:
    """The model as transformers and peft make it, with memplan's initial adapters."""
    from transformers import AutoModelForCausalLM

    from memplan.train.adapters import draw_adapters
    from memplan.train.seeds import derive_seed

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype)).to(device)
    model.config.use_cache = False
    if job.method == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=job.lora.rank,
            lora_alpha=int(job.lora.alpha),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        draw_adapters(model, device, derive_seed(job.train.seed, "adapters"))
    return model


def training_arguments(job: Job, folder: Path, device: torch.device) -> dict[str, Any]:
    """What makes their trainers do the same job; everything else is their default."""
    return {
        "output_dir": str(folder / "output"),
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "max_steps": job.train.max_steps,
        "learning_rate": job.train.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": job.train.weight_decay,
        "max_grad_norm": job.train.max_grad_norm,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": job.train.seed,
    }


def train_transformers(folder: Path, turns: Turns, *, with_trl: bool) -> Outcome:
    """transformers' Trainer, or TRL's SFTTrainer."""
    import datasets
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

    job = read_job(folder / JOB_FILE)
    device = find_device(0, 1)
    rows, tokens, tokenizer = rows_in_order(job)
    data = datasets.Dataset.from_list(rows)
    meter: Meter = make_meter(device)
    meter.begin("load", 0)
    model = build_transformers_model(job, device)
    meter.adopt(model)
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.next()
            meter.begin("step", state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.end_step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    common = training_arguments(job, folder, device)
    trainer: Any
    if with_trl:
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(**common, max_length=job.max_seq_len)
        trainer = SFTTrainer(
            model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()]
        )
    else:
        trainer = Trainer(
            model,
            TrainingArguments(**common),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            train_dataset=data,
            callbacks=[Watch()],
        )
    trainer.train()
    turns.end()
    peak_bytes = max(peak.allocated_peak_bytes for peak in meter.peaks() if peak.step > 0)
    return Outcome(losses, tokens, turns.cpu_seconds, turns.wall_seconds, peak_bytes)


def run_trainer(name: str, folder: Path, pipe: Any) -> None:
    """
    Run the trainer `name` on the job in `folder`, and leave its outcome there.

    Args:
        pipe: of multiprocessing; is told before each step, and answers when the step may begin.
    """
    with (folder / LOG).open("w") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    os.environ |= {"MEMPLAN_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)

    def wait() -> None:
        pipe.send("ready")
        pipe.recv()

    outcome = train(name, folder, Turns(wait))
    (folder / RESULT).write_text(json.dumps(asdict(outcome)), encoding="utf-8")


def train(name: str, folder: Path, turns: Turns) -> Outcome:
    """What the trainer of that name makes of the job in `folder`."""
    if name.startswith("memplan"):
        return train_memplan(folder, turns)
    return train_transformers(folder, turns, with_trl=name == "SFTTrainer")
