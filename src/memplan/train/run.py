"""One run of a job in its folder: plan, data, model, steps, checkpoints, final weights, closing table."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from memplan.budget.result import Result
from memplan.errors import RunError, UnknownModel
from memplan.job.spec import Job
from memplan.model import Architecture, resolve_config, resolve_model
from memplan.model.catalogue import find_model
from memplan.train import report
from memplan.train.build import Built, build_model
from memplan.train.checkpoint import (
    Checkpoint,
    State,
    load_latest,
    publish_folder,
    remove_unfinished,
    save_checkpoint,
)
from memplan.train.data import Batches, Samples, build_samples, read_documents
from memplan.train.launch import CHECKPOINTS, FINAL, check_device
from memplan.train.loop import Loop, StepResult
from memplan.train.measure import Meter, make_meter
from memplan.train.optimizer import build_optimizer
from memplan.train.record import Metrics, PhasePeak, Record, read_metrics_lines
from memplan.train.report import say
from memplan.train.tokens import Tokenizer, load_tokenizer, model_folder

OPTIMIZER_FILE = "optimizer.pt"


class Interrupted(BaseException):
    """A signal asked the run to end. `step` steps are done and saved; 0 if it came before the first."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.step = step


class Run:
    """
    One run of `job` in `folder`; the job's paths are absolute.

    Args:
        dry_run: stop before the first step, and leave the output folder as it is.
        resume: continue from the newest checkpoint.
        stop_signal: asked after every step; a signal's number ends the run with a checkpoint.
        hook: is told (phase, step) when a phase begins.
    """

    def __init__(
        self,
        folder: Path,
        job: Job,
        *,
        resume: bool = False,
        dry_run: bool = False,
        stop_signal: Callable[[], int | None] = lambda: None,
        hook: Callable[[str, int], None] = lambda phase, step: None,
    ) -> None:
        self.folder = folder
        self.job = job
        self.checkpoints = Path(job.train.output_dir) / CHECKPOINTS
        self.resume = resume
        self.dry_run = dry_run
        self.stop_signal = stop_signal
        self.hook = hook
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.record = Record.start(folder, asdict(job))
        self.resume_command = report.resume_command(folder)
        self.phase: tuple[str, int] = ("load", 0)
        self.saved_step: int | None = None
        self.plan: Result | None = None
        self.architecture: Architecture | None = None
        self._meter: Meter | None = None
        self._built: Built | None = None
        self._loop: Loop | None = None
        self._state = State(0, "", "", job.global_batch_size)

    def execute(self) -> None:
        """
        Everything from the plan to the final weights.

        Raises:
            MemplanError: with the remedy.
            Interrupted: after a checkpoint.
            torch.OutOfMemoryError, RuntimeError: from torch, while `phase` says where.
        """
        check_device(self.job, self.device.type)
        config = resolve_config(self.job.model).config
        self._make_plan()
        self.record.update(versions=_versions(), device=describe_device(self.device))
        tokenizer = self._load_tokenizer(config)
        samples = self._read_samples(tokenizer, self.job.data.train, split="train")
        evaluation = None
        if self.job.data.eval is not None:
            evaluation = self._batches(self._read_samples(tokenizer, self.job.data.eval, split="validation"))
        if not self.dry_run:
            remove_unfinished(self.checkpoints)
        checkpoint = load_latest(self.checkpoints, warn=say) if self.resume else None
        start = checkpoint.state.step if checkpoint else 0
        loop = self._load(config, samples, checkpoint)
        if self.dry_run:
            say("dry run: the data and the model are loaded and ready for the first step")
            return
        self._train(start, loop, evaluation)
        self._publish_final(tokenizer, max(start, self.job.train.max_steps))

    def begin(self, phase: str, step: int) -> None:
        """A phase begins."""
        self.phase = (phase, step)
        if self._meter is not None:
            self._meter.begin(phase, step)
        self.hook(phase, step)

    def release(self) -> None:
        """Let go of everything on the device."""
        self._loop = self._built = None

    @property
    def peaks(self) -> list[PhasePeak]:
        """What was measured; asking ends the measuring on the CPU."""
        return self._meter.peaks() if self._meter is not None else []

    def finish(self, outcome: str, error: str | None = None) -> None:
        """Complete the record: how the run ended and what was measured."""
        peaks = self.peaks
        highest = max(peaks, key=lambda peak: peak.allocated_peak_bytes, default=None)
        lines = read_metrics_lines(self.folder)
        self.record.update(
            measured={
                "phases": [asdict(peak) for peak in peaks],
                "peak": asdict(highest) if highest else None,
            },
            steps={
                "first": lines[0]["step"] if lines else None,
                "last": lines[-1]["step"] if lines else None,
                "max": self.job.train.max_steps,
            },
            loss={"first": lines[0]["loss"] if lines else None, "last": lines[-1]["loss"] if lines else None},
        )
        self.record.finish(outcome, error)

    def _make_plan(self) -> None:
        from memplan.budget.estimate import estimate

        try:
            self.architecture = resolve_model(self.job.model)
            self.plan = estimate(self.job.replace(loop="memplan"), self.architecture, device=self.device.type)
        except UnknownModel as error:
            say(f"note: no plan to compare with: {error.message}")
            return
        self.record.update(plan=self.plan.to_json())
        for line in report.plan_lines(self.plan, self.device.type):
            say(line)
        positions = self.architecture.max_position_embeddings
        if self.architecture.family == "gpt2" and self.job.max_seq_len > positions:
            raise RunError(
                f"`max_seq_len` is {self.job.max_seq_len}, and the model has {positions} positions",
                hint=f"use `--set max_seq_len={positions}`",
            )

    def _load_tokenizer(self, config: dict[str, Any]) -> Tokenizer:
        vocab_size = self.architecture.vocab_size if self.architecture else config.get("vocab_size")
        if not isinstance(vocab_size, int):
            raise RunError("the model's config names no `vocab_size`", hint="add it to its config.json")
        folder = model_folder(self.job.model, None)
        return load_tokenizer(self._weights_source(), folder, weights=self.job.weights, vocab_size=vocab_size)

    def _weights_source(self) -> str:
        """Local folder or hub id of the model."""
        folder = model_folder(self.job.model, None)
        if folder is not None:
            return str(folder)
        entry = find_model(self.job.model)
        return entry.hub_ids[0] if entry is not None and entry.hub_ids else self.job.model

    def _read_samples(self, tokenizer: Tokenizer, source: str | None, *, split: str) -> Samples:
        assert source is not None
        documents = read_documents(source, column=self.job.data.text, resolve=Path, split=split)
        samples = build_samples(
            documents, tokenizer.encode, max_seq_len=self.job.max_seq_len, packing=self.job.packing
        )
        longest = max(map(samples.length, range(len(samples))))
        cut = f", {samples.num_truncated:,} of them truncated" if samples.num_truncated else ""
        name = "data" if split == "train" else "evaluation data"
        say(f"{name}: {len(samples):,} samples of up to {longest:,} tokens ({tokenizer.name}){cut}")
        if split == "train":
            self.record.update(
                data={
                    "samples": len(samples),
                    "truncated": samples.num_truncated,
                    "longest": longest,
                    "tokenizer": tokenizer.name,
                }
            )
        return samples

    def _batches(self, samples: Samples) -> Batches:
        job = self.job
        return Batches(samples, job.micro_batch_size, job.gradient_accumulation_steps, job.train.seed)

    def _load(self, config: dict[str, Any], samples: Samples, checkpoint: Checkpoint | None) -> Loop:
        """Model, optimizer and loop, from the checkpoint where there is one."""
        job = self.job
        self._meter = make_meter(self.device)
        self.begin("load", 0)
        weights_path = self._weights_source() if job.weights == "pretrained" else None
        if checkpoint is not None and job.method == "full":
            weights_path = str(checkpoint.path)
        built = build_model(job, config, self.device, weights_path=weights_path)
        optimizer = build_optimizer(job, built.trainable)
        self._state = State(0, samples.fingerprint(), built.base_fingerprint(), job.global_batch_size)
        if checkpoint is not None:
            self._restore(checkpoint, built, optimizer)
        self._built = built
        self._loop = Loop(job, built, optimizer, self._batches(samples), self.device, begin=self.begin)
        self._meter.adopt(built.model)
        return self._loop

    def _restore(self, checkpoint: Checkpoint, built: Built, optimizer: torch.optim.Optimizer) -> None:
        causes = {
            "data": "the data or the tokenizer has changed",
            "base": "the base weights are not those it was trained on",
            "global_batch_size": "the global batch size has changed",
        }
        for name, cause in causes.items():
            if getattr(checkpoint.state, name) != getattr(self._state, name):
                raise RunError(
                    f"`{checkpoint.path}` cannot be continued: {cause}",
                    hint="bring it back, or start anew with `--set train.output_dir=...`",
                )
        if self.job.method != "full":
            built.load_weights(checkpoint.path)
        saved = torch.load(checkpoint.path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        # Groups carry the choice of kernel, which may have changed since.
        optimizer.load_state_dict(
            {"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]}
        )
        self.saved_step = checkpoint.state.step
        self.record.update(resumed_from=checkpoint.state.step)
        say(f"continuing after step {checkpoint.state.step}")

    def _train(self, start: int, loop: Loop, evaluation: Batches | None) -> None:
        job, meter = self.job, self._meter
        assert meter is not None
        last = job.train.max_steps
        metrics = Metrics(self.folder, resumed_from=start)
        progress = report.Progress(first=start + 1, last=last, plan=self.plan)
        try:
            for step in range(start + 1, last + 1):
                began = time.perf_counter()
                result = loop.step(step)
                seconds = time.perf_counter() - began
                meter.end_step(step)
                signum = self.stop_signal()
                saves = signum is not None or step == last or step % job.train.save_every == 0
                line = _metrics_line(result, seconds, meter.live_bytes())
                if saves and evaluation is not None:
                    line["eval_loss"] = loop.evaluate(evaluation)
                metrics.append(line)
                progress.step(step, line, meter.peak_bytes())
                if saves:
                    self._save(step)
                if signum is not None and step < last:
                    raise Interrupted(signum, step)
        finally:
            metrics.close()
            progress.close()

    def _save(self, step: int) -> None:
        """
        Publish a checkpoint.

        Raises:
            RunError: the weights are not numbers any more, or the disk is full; the message names the
            checkpoint that is left.
        """
        built, loop = self._built, self._loop
        assert built is not None and loop is not None

        def write(folder: Path) -> None:
            built.save_weights(folder)
            torch.save(loop.optimizer.state_dict(), folder / OPTIMIZER_FILE)

        if not all(bool(parameter.isfinite().all()) for parameter in built.trainable):
            raise RunError(
                f"the weights are not finite after step {step}", hint="lower `train.learning_rate`"
            )
        try:
            save_checkpoint(self.checkpoints, replace(self._state, step=step), write)
        except RunError as error:
            raise RunError(error.message, hint="make room on the disk") from error
        self.saved_step = step

    def _publish_final(self, tokenizer: Tokenizer, step: int) -> None:
        built = self._built
        assert built is not None

        def write(folder: Path) -> None:
            built.save_weights(folder)
            if tokenizer.save is not None:
                tokenizer.save(folder)

        publish_folder(self.folder / FINAL, replace(self._state, step=step), write)


def _metrics_line(result: StepResult, seconds: float, memory_bytes: int) -> dict[str, Any]:
    """One line of `metrics.jsonl`; `memory` in bytes: allocated on CUDA, resident on the CPU."""
    line: dict[str, Any] = {
        "step": result.step,
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "tokens": result.num_tokens,
        "tokens_per_s": result.num_tokens / seconds,
        "memory": memory_bytes,
    }
    if result.relative_error is not None:
        line["relative_error"] = {str(layer): error for layer, error in result.relative_error.items()}
    return line


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    from memplan import __version__

    versions = {"memplan": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "peft", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def describe_device(device: torch.device) -> dict[str, Any]:
    """Type, name and bytes of memory of what the run runs on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"type": "cuda", "name": properties.name, "total_bytes": properties.total_memory}
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "type": "cpu",
        "name": f"{torch.get_num_threads()} threads, {platform.machine()}",
        "total_bytes": total,
    }
