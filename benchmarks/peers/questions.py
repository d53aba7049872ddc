"""The runs that everybody is asked about, and memplan's own answers."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from benchmarks.compare import ONE_GPU, PEAKS, Row, Run
from benchmarks.published import Case
from memplan.budget.estimate import estimate
from memplan.errors import MemplanError
from memplan.gpu.catalogue import match_gpu
from memplan.model import num_parameters
from memplan.model.resolve import resolve_config
from memplan.tape.behaviour import Behaviour

Reply = dict[str, Any]


def asked(cases: list[Case]) -> list[Case]:
    """The complete runs on one GPU by transformers, the smallest models first."""
    chosen = [case for case in cases if case.fields and _group(case) == ONE_GPU]
    return sorted(chosen, key=lambda case: num_parameters(case.architecture))


def _group(case: Case) -> str:
    return Row(case, case.measured, 0).group


def measured(case: Case) -> dict[str, int]:
    """Peaks of this run, in bytes."""
    figures = (case.measured, *case.also_measured)
    return {figure.statistic: figure.bytes for figure in figures if figure.statistic in PEAKS}


def question(case: Case) -> dict[str, Any]:
    """What a peer is told: the job, the model's config.json, and counts that the model's page shows."""
    job, config = case.job, config_of(case)
    card = match_gpu(job.gpu) if job.gpu else None
    targets = job.lora.target_modules
    return {
        "id": case.id,
        "model": case.model,
        "config": config,
        "job": dataclasses.asdict(job),
        "targets": list(targets) if not isinstance(targets, str) else [targets],
        "num_parameters": num_parameters(case.architecture),
        "trainable": estimate(job, case.architecture).parameters.trainable,
        "tied": bool(config.get("tie_word_embeddings", config["model_type"] == "gpt2")),
        "gpu_bytes": (card.memory_bytes if card else None) or 0,
    }


def config_of(case: Case) -> dict[str, Any]:
    """Its config.json."""
    if case.config is not None:
        return dict(case.config)
    return dict(resolve_config(case.job.model, offline=True).config)


class TracedRun(Run):
    """A case whose tape the trace writer wrote, with the software at hand."""

    def __init__(self, case: Case) -> None:
        from memplan.tracing.writer import trace_job

        self.case = case
        self.behaviour = Behaviour.for_job(case.job)
        self.tape = trace_job(case.job, config_of(case)).flatten()
        self.replay = self._through_the_allocator()


def ours(case: Case, engine: str) -> Reply:
    """memplan's answer: `shape`, `shape, told the software` or `trace`."""
    start = time.process_time()
    try:
        run = _run(case, engine)
    except MemplanError as error:
        return {"id": case.id, "word": str(error).splitlines()[0][:120]}
    predicted = {statistic: run.predict(statistic) for statistic in measured(case)}
    return {"id": case.id, "predicted": predicted, "seconds": time.process_time() - start}


def _run(case: Case, engine: str) -> Run:
    if engine == "trace":
        return TracedRun(case)
    return Run(case, Behaviour.for_job(case.job) if engine == "shape" else case.behaviour)
