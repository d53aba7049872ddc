"""One run of a job in its folder: plan, data, model, steps, checkpoints, final weights, closing table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memplan.budget.result import Result
from memplan.errors import RunError, UnknownModel
from memplan.job.spec import Job
from memplan.model import Architecture, resolve_config, resolve_model
from memplan.train import report
from memplan.train.build import Built
from memplan.train.checkpoint import (
    Checkpoint,
    State,
    load_latest,
    publish_folder,
    remove_unfinished,
    save_checkpoint,
)
from memplan.train.data import Batches, job_batches
from memplan.train.final_weights import complete_model, save_weights
from memplan.train.group import Group, find_device
from memplan.train.history import EvaluationHistory
from memplan.train.host_optimizer import host_copies
from memplan.train.loop import Loop
from memplan.train.machine import describe_device, installed_versions
from memplan.train.measure import Meter, inventory, make_meter
from memplan.train.metrics import evaluation_fields, metrics_line
from memplan.train.optimizer import build_optimizer
from memplan.train.output_folder import CHECKPOINTS, FINAL
from memplan.train.parallel import Parallel, build_parallel
from memplan.train.record import Metrics, PhasePeak, Record, read_metrics_lines
from memplan.train.refusals import check_device
from memplan.train.run_data import make_room, read_samples
from memplan.train.samples import Samples
from memplan.train.speech import say
from memplan.train.tokens import Tokenizer, job_tokenizer, weights_source
from memplan.train.trackers import open_tracker
from memplan.train.training_state import base_fingerprint, largest_read_bytes, load_state, save_state


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
        group: the processes that run it together, each with a `Run` of its own; None: this one alone.
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
        group: Group | None = None,
    ) -> None:
        self.folder = folder
        self.job = job
        self.checkpoints = Path(job.train.output_dir) / CHECKPOINTS
        self.resume = resume
        self.dry_run = dry_run
        self.stop_signal = stop_signal
        self.hook = hook
        self.group = group or Group(device=find_device(0, 1))
        self.device = self.group.device
        self.record = Record.start(folder, asdict(job), is_written=self.group.is_first)
        self.resume_command = report.resume_command(Path(job.train.output_dir))
        self.phase: tuple[str, int] = ("load", 0)
        self.saved_step: int | None = None
        self.plan: Result | None = None
        self.architecture: Architecture | None = None
        self._meter: Meter | None = None
        self._built: Built | None = None
        self._parallel: Parallel | None = None
        self._loop: Loop | None = None
        self._stepped: dict[str, nn.Parameter] = {}
        """What the optimizer steps, by the names of the model: its parameters, or copies of them on the host."""
        self._decode: Callable[[list[int]], str] | None = None
        self._gathered: list[PhasePeak] = []
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
        try:
            self.architecture = resolve_model(self.job.model)
        except UnknownModel as error:
            say(f"note: no plan to compare with: {error.message}")
        vocab_size = self.architecture.vocab_size if self.architecture else config.get("vocab_size")
        tokenizer = job_tokenizer(self.job, vocab_size)
        config, self.architecture = make_room(self.job, config, tokenizer, self.architecture)
        if not self.dry_run and self.group.is_first:
            remove_unfinished(self.checkpoints)
        checkpoint = self._find_checkpoint() if self.resume else None
        self._make_plan(checkpoint)
        self.record.update(versions=installed_versions(), device=describe_device(self.device))
        self._decode = tokenizer.decode
        assert self.job.data.train is not None
        samples, summary = read_samples(self.job, self.folder, tokenizer, self.job.data.train, split="train")
        self.record.update(data=summary)
        if self.job.train.epochs is not None:
            self._count_steps(self.job.train.epochs, samples)
        evaluation = None
        if self.job.data.eval is not None:
            evaluated, _ = read_samples(
                self.job, self.folder, tokenizer, self.job.data.eval, split="validation"
            )
            evaluation = job_batches(self.job, evaluated)
        start = checkpoint.state.step if checkpoint else 0
        loop = self._load(config, tokenizer, samples, checkpoint)
        if self.dry_run:
            say("dry run: the data and the model are loaded and ready for the first step")
            return
        self._publish_final(tokenizer, self._train(start, loop, evaluation))

    def begin(self, phase: str, step: int) -> None:
        """A phase begins."""
        self.phase = (phase, step)
        if self._meter is not None:
            self._meter.begin(phase, step)
        self.hook(phase, step)

    def release(self) -> None:
        """Let go of everything on the device."""
        self._loop = self._built = self._parallel = None
        self._stepped = {}

    @property
    def peaks(self) -> list[PhasePeak]:
        """
        What was measured on this rank, and on the others once `gather_peaks` was called; asking ends the measuring on
        the CPU.
        """
        mine = self._meter.peaks() if self._meter is not None else []
        return self._gathered or [replace(peak, rank=self.group.rank) for peak in mine]

    def stop_measuring(self) -> None:
        """Keep what was measured, and stop the profiler: a process that ends while it runs ends badly."""
        if self._meter is not None:
            self._meter.peaks()

    def gather_peaks(self) -> None:
        """Have every rank's peaks on every rank. All of them call it."""
        self._gathered = [peak for peaks in self.group.collect(self.peaks) for peak in peaks]

    def finish(self, outcome: str, error: str | None = None) -> None:
        """Complete the record: how the run ended and what was measured. A rank that is not the first adds its cause."""
        if not self.group.is_first:
            record = Record.read(Path(self.job.train.output_dir))
            if record is not None:
                record.finish(outcome, error)
            return
        lines = read_metrics_lines(self.folder)
        self.record.update(
            measured=report.measured_fields(self.peaks),
            steps={
                "first": lines[0]["step"] if lines else None,
                "last": lines[-1]["step"] if lines else None,
                "max": self.job.train.max_steps,
            },
            loss={"first": lines[0]["loss"] if lines else None, "last": lines[-1]["loss"] if lines else None},
        )
        self.record.finish(outcome, error)

    def _make_plan(self, checkpoint: Checkpoint | None) -> None:
        from memplan.budget.estimate import estimate

        if self.architecture is None:
            return
        self.plan = estimate(
            self.job.replace(loop="memplan"),
            self.architecture,
            device=self.device.type,
            read_bytes=largest_read_bytes(checkpoint.path) if checkpoint else None,
        )
        self.record.update(plan=self.plan.to_json())
        for line in report.plan_lines(self.plan, self.device.type, num_ranks=self.group.world_size):
            say(line)
        positions = self.architecture.max_position_embeddings
        if self.architecture.family == "gpt2" and self.job.max_seq_len > positions:
            raise RunError(
                f"`max_seq_len` is {self.job.max_seq_len}, and the model has {positions} positions",
                hint=f"use `--set max_seq_len={positions}`",
            )

    def _count_steps(self, epochs: float, samples: Samples) -> None:
        """From now on the job has the steps that so many passes over the data take."""
        steps = ceil(epochs * len(samples) / self.job.global_batch_size)
        self.job = self.job.replace(**{"train.max_steps": steps})
        self.record.update(steps={**self.record.fields["steps"], "max": steps})
        say(f"{epochs:g} epochs are {steps} steps of {self.job.global_batch_size} samples")

    def _find_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole: the first rank looks, and all take what it has found."""
        found = load_latest(self.checkpoints, warn=say) if self.group.is_first else None
        return next(iter(self.group.collect(found)))

    def _load(
        self, config: dict[str, Any], tokenizer: Tokenizer, samples: Samples, checkpoint: Checkpoint | None
    ) -> Loop:
        """Model, optimizer and loop, from the checkpoint where there is one."""
        job = self.job
        self._meter = make_meter(self.device)
        self.begin("load", 0)
        weights_path = weights_source(job) if job.weights == "pretrained" else None
        parallel = build_parallel(
            job,
            config,
            self.group,
            weights_path=weights_path,
            token_ids=tokenizer.special_ids if tokenizer.special_ids else None,
        )
        built = parallel.built
        copies = host_copies(job, parallel.trainable, self.device)
        self._stepped = copies.parameters if copies else parallel.trainable
        optimizer = build_optimizer(job, list(self._stepped.values()))
        if copies:
            copies.follow(optimizer)
        base = base_fingerprint(built.model, self.group, job.parallel.dp_shard)
        self._state = State(0, samples.digest, base, job.global_batch_size)
        if checkpoint is not None:
            self._restore(checkpoint, optimizer)
            if copies:
                copies.bring_weights()
        self._built, self._parallel = built, parallel
        self._loop = Loop(
            job, built, optimizer, job_batches(job, samples), self.device, parallel=parallel, begin=self.begin
        )
        if checkpoint is not None:
            self._loop.loss_scale.load(checkpoint.path)
        self._meter.adopt(built.model)
        return self._loop

    def _restore(self, checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
        checkpoint.check_continues(self._state)
        load_state(checkpoint.path, self._stepped, optimizer)
        self.saved_step = checkpoint.state.step
        self.record.update(resumed_from=checkpoint.state.step)
        say(f"continuing after step {checkpoint.state.step}")

    def _train(self, start: int, loop: Loop, evaluation: Batches | None) -> int:
        """The steps after `start`; the last one done, which early stopping may bring forward."""
        train, meter = self.job.train, self._meter
        assert meter is not None
        last = max(start, train.max_steps)
        lines = read_metrics_lines(Path(train.output_dir))
        history = EvaluationHistory.from_metrics(line for line in lines if line["step"] <= start)
        watch = report.Watch(
            self.plan, self.record, meter, lambda: inventory(loop.built.model, loop.optimizer)
        )
        is_first = self.group.is_first
        metrics = Metrics(self.folder, resumed_from=start) if is_first else None
        progress = report.Progress(first=start + 1, last=last, plan=self.plan) if is_first else None
        tracker = open_tracker(
            train.report_to if is_first else "none", self.folder, asdict(self.job), resumed_from=start
        )
        try:
            for step in range(start + 1, last + 1):
                if history.is_exhausted(train.early_stopping):
                    if is_first:
                        say(report.early_stop_line(history, step - 1))
                    return step - 1
                began = time.perf_counter()
                result = loop.step(step)
                seconds = time.perf_counter() - began
                meter.end_step(step)
                signum = self.group.highest(self.stop_signal() or 0) or None
                saves = signum is not None or step == last or step % train.save_every == 0
                line = metrics_line(result, seconds, meter.live_bytes(), self.job.global_batch_size)
                if evaluation is not None and (saves or step % (train.eval_every or train.save_every) == 0):
                    line |= self._evaluate(loop, evaluation, history, step)
                    is_best = train.keep_best and history.best_step == step
                    saves = saves or is_best or history.is_exhausted(train.early_stopping)
                if metrics is not None and progress is not None:
                    metrics.append(line)
                    tracker.log(line)
                    progress.step(step, line, meter.peak_bytes())
                    for sentence in watch.after_step(step):
                        progress.say(sentence)
                if saves:
                    self._save(step, history.best_step if train.keep_best else None)
                if signum is not None and step < last:
                    raise Interrupted(signum, step)
            return last
        finally:
            if metrics is not None and progress is not None:
                metrics.close()
                progress.close()
            tracker.close()

    def _evaluate(
        self, loop: Loop, evaluation: Batches, history: EvaluationHistory, step: int
    ) -> dict[str, Any]:
        """What an evaluation adds to the step's line, and to the history."""
        evaluated = loop.evaluate(evaluation, step)
        history.add(step, evaluated.loss)
        self._say_samples(loop, evaluation, step)
        return evaluation_fields(evaluated)

    def _say_samples(self, loop: Loop, evaluation: Batches, step: int) -> None:
        """What the model writes."""
        if not self.job.train.sample_prompts or self._decode is None:
            return
        from memplan.train.continuations import continuations, sample_lines

        found = continuations(self.job, loop.parallel, evaluation.samples, self._decode)
        for line in sample_lines(found, step):
            say(line)

    def _save(self, step: int, best_step: int | None) -> None:
        """
        Publish a checkpoint, and keep that of `best_step`.

        Raises:
            RunError: the weights are not numbers any more, or the disk is full; the message names the
            checkpoint that is left.
        """
        built, parallel, loop = self._built, self._parallel, self._loop
        assert built is not None and parallel is not None and loop is not None

        def write(folder: Path) -> None:
            save_state(folder, self._stepped, loop.optimizer, self.group)
            if self.group.is_first:
                loop.loss_scale.save(folder)
            if self.job.method != "full":
                save_weights(folder, built, parallel)

        if not parallel.all_finite():
            raise RunError(
                f"the weights are not finite after step {step}", hint="lower `train.learning_rate`"
            )
        try:
            save_checkpoint(
                self.checkpoints,
                replace(self._state, step=step),
                write,
                self.group,
                keep=self.job.train.keep_checkpoints,
                best_step=best_step,
            )
        except RunError as error:
            raise RunError(error.message, hint="make room on the disk") from error
        self.saved_step = step

    def _publish_final(self, tokenizer: Tokenizer, step: int) -> None:
        built, parallel = self._built, self._parallel
        assert built is not None and parallel is not None

        def write(folder: Path) -> None:
            save_weights(folder, built, parallel)
            if self.job.method == "full" and self.group.is_first:
                source = weights_source(self.job) if self.job.weights == "pretrained" else None
                complete_model(folder, built, source, resolve_config(self.job.model).config)
            if tokenizer.save is not None and self.group.is_first:
                tokenizer.save(folder)

        output = Path(self.job.train.output_dir)
        publish_folder(output / FINAL, replace(self._state, step=step), write, self.group)
        self.gather_peaks()
