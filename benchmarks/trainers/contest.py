"""Trainers side by side: each in a process of its own, one step each in turn."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.trainers.case import Size, make_job, prepare
from benchmarks.trainers.child import LOG, RESULT, Outcome, run_trainer
from memplan.job.spec import Job

REFERENCE = "Trainer"
SFT = "SFTTrainer"
VARIANTS: dict[str, dict[str, Any]] = {
    "memplan, full loss": {"loss": "full"},
    "memplan, chunked loss": {"loss": "chunked"},
    "memplan, chunked loss, packing": {"loss": "chunked", "packing": True},
    REFERENCE: {},
    SFT: {},
}
UNTIMED_STEPS = 4
"""The meters' profiler runs in three, on the CPU; the next one may still pay for its end."""
PRELOAD = (
    "benchmarks.trainers.child", "memplan.train.worker", "datasets", "peft", "trl.trainer.sft_trainer",
    "transformers.trainer", "transformers.models.llama.modeling_llama",
)  # fmt: skip
ROOT = Path(__file__).parent.parent.parent


def installed(name: str) -> bool:
    """Whether what a trainer needs is there."""
    return name != SFT or find_spec("trl") is not None


def contest(root: Path, method: str, size: Size, dtype: str, *, wants: list[str]) -> dict[str, Outcome]:
    """
    Train the job with each of the trainers, in `root`; their outcomes.

    Raises:
        SystemExit: a trainer failed; what it said is in the message.
    """
    job = make_job(root, method, size, dtype)
    context = multiprocessing.get_context("forkserver")
    # Imported once, and nothing else done there: every trainer begins with the same few bytes.
    context.set_forkserver_preload([name for name in PRELOAD if find_spec(name.partition(".")[0])])
    with ExitStack() as stack:
        children = {name: _Child(name, root, job, context, stack) for name in wants}
        for child in children.values():
            child.wait()
        for step in range(size.steps):
            # Forth and back, so that none is always the first after another.
            for name in list(wants) if step % 2 else reversed(wants):
                children[name].step()
        return {name: child.outcome() for name, child in children.items()}


class _Child:
    """A trainer's process, and its turns."""

    def __init__(self, name: str, root: Path, job: Job, context: Any, stack: ExitStack) -> None:
        self.name = name
        self.folder = root / name.replace(" ", "-").replace(",", "")
        prepare(job.replace(**VARIANTS[name]), self.folder)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_trainer, args=(name, self.folder, theirs), daemon=True)
        self._process.start()
        stack.callback(self._end)
        theirs.close()

    def wait(self) -> None:
        """Until its next turn, or its end after the last one."""
        with suppress(EOFError):
            self._pipe.recv()
            return
        self._process.join()
        if self._process.exitcode != 0:
            said = (self.folder / LOG).read_text(encoding="utf-8")
            raise SystemExit(f"{self.name} failed:\n{said[-3000:]}")

    def step(self) -> None:
        """One optimizer step, to its end."""
        self._pipe.send("go")
        self.wait()

    def outcome(self) -> Outcome:
        """What it did, once it has ended."""
        return Outcome(**json.loads((self.folder / RESULT).read_text(encoding="utf-8")))

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def speed_ratio(mine: Outcome, other: Outcome, *, clock: str) -> float | None:
    """
    Tokens per second of one trainer over those of another, the median over pairs of neighbouring steps.

    Args:
        clock: `cpu_seconds` or `wall_seconds`.
    """
    pairs = list(zip(rates(mine, clock), rates(other, clock)))
    return median(ours / theirs for ours, theirs in pairs) if pairs else None


def rates(outcome: Outcome, clock: str) -> list[float]:
    """Tokens that the loss was taken on per second, of every timed step; the last one may include saving."""
    steps = zip(outcome.tokens, getattr(outcome, clock))
    return [tokens / seconds for tokens, seconds in list(steps)[UNTIMED_STEPS:-1]]


def loss_difference(mine: Outcome, other: Outcome) -> float:
    """The largest difference of two loss curves."""
    return max(abs(ours - theirs) for ours, theirs in zip(mine.losses, other.losses, strict=True))
