"""
`python -m benchmarks.faults --kills 200`: kills training again and again, and checks what is left.

Tiny jobs are trained in processes that get SIGKILL, with their whole process group, at a random moment: while they
load, compute, write a checkpoint or the final weights. After every kill each published checkpoint must verify, and no
more than `save_every` steps may be lost. Once a job has completed in spite of it, each loss and every final weight
must be, bit for bit, that of the same job left alone.

Processes are forked from this one, which has the libraries loaded, so that a kill costs about a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memplan.job.spec import Job
from memplan.train.checkpoint import find_damage, load_latest
from memplan.train.output_folder import JOB_FILE, write_job
from memplan.train.record import read_metrics_lines

CONFIG = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4,
    "vocab_size": 260, "n_positions": 64, "activation_function": "gelu_new",
}  # fmt: skip
COMBINATIONS: tuple[dict[str, Any], ...] = (
    {"method": "lora", "lora.dropout": 0.1, "activation_checkpointing": "full"},
    {"method": "full", "optimizer": "sgd", "train.schedule": "cosine", "packing": True},
    {"method": "full", "train.weight_decay": 0.1, "loss": "chunked", "train.eval_every": 3},
    {"method": "npt"},
)
"""Changes of the job that is killed, one after the other."""


@dataclass
class Tally:
    """What was seen."""

    kills: int = 0
    completed: int = 0
    most_lost: int = 0
    failures: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """Run the harness; 1 if anything was lost that should not be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description="Kill training and check"
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(COMBINATIONS), help="how many of the jobs are killed")
    options = parser.parse_args(arguments)
    _load_libraries()
    tally, generator = Tally(), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="memplan-faults-") as scratch:
        for number in range(options.jobs):
            share = len(range(number, options.kills, options.jobs))
            if not share:
                continue
            _kill_combination(Path(scratch) / str(number), COMBINATIONS[number], share, generator, tally)
    print(
        f"{tally.kills} kills, {tally.completed} runs completed in spite of them, "
        f"at most {tally.most_lost} steps lost at once, {len(tally.failures)} failures"
    )
    for failure in tally.failures:
        print(f"failure: {failure}")
    return 1 if tally.failures else 0


def make_job(root: Path, changes: dict[str, Any]) -> Job:
    """A job of a few thousand weights; a checkpoint every second step."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(CONFIG))
    (root / "train.jsonl").write_text(
        "".join(json.dumps({"text": "a b c " * n}) + "\n" for n in range(1, 12))
    )
    job = Job(model=str(root), weights="random", dtype="float32", micro_batch_size=2, max_seq_len=32).replace(
        **{"npt.layers": "all", "npt.rank": 4, "lora.rank": 4, "data.train": str(root / "train.jsonl")},
        **{"train.max_steps": 8, "train.save_every": 2, "train.learning_rate": 1e-2},
    )
    if "train.eval_every" in changes:
        job = job.replace(**{"data.eval": str(root / "train.jsonl")})
    return job.replace(**changes)


def _kill_combination(
    root: Path, changes: dict[str, Any], kills: int, generator: random.Random, tally: Tally
) -> None:
    job = make_job(root, changes)
    began = time.monotonic()
    whole = _folder(root / "whole", job)
    if _wait(_start(whole, resume=False)) != 0:
        tally.failures.append(f"{changes}: the undisturbed run failed")
        return
    seconds = time.monotonic() - began
    round_number = 0
    while kills > 0:
        folder = _folder(root / f"round-{round_number}", job)
        round_number += 1
        killed = 0
        while True:
            pid = _start(folder, resume=killed > 0)
            # A run that is killed at every turn would never end: each gets more time than the one before it.
            delay = generator.uniform(0, seconds * (1 + killed / 2)) if kills > 0 else None
            code = _kill_after(pid, delay)
            if code is not None:
                break
            kills, killed = kills - 1, killed + 1
            tally.kills += 1
            _check_remains(folder, job, changes, tally)
        if code != 0:
            tally.failures.append(f"{changes}: a run that was not killed ended with exit code {code}")
            continue
        tally.completed += 1
        _compare(whole, folder, changes, tally)


def _check_remains(folder: Path, job: Job, changes: dict[str, Any], tally: Tally) -> None:
    root = folder / "checkpoints"
    for path in root.glob("step-*") if root.is_dir() else ():
        damage = find_damage(path)
        if damage:
            tally.failures.append(f"{changes}: `{path.name}`: {damage}")
    newest = load_latest(root, warn=lambda text: None)
    lines = read_metrics_lines(folder)
    lost = (lines[-1]["step"] if lines else 0) - (newest.state.step if newest else 0)
    tally.most_lost = max(tally.most_lost, lost)
    if lost > job.train.save_every:
        tally.failures.append(f"{changes}: {lost} steps lost")


def _compare(whole: Path, folder: Path, changes: dict[str, Any], tally: Tally) -> None:
    def learnt(path: Path) -> list[tuple[Any, ...]]:
        return [(line["step"], line["loss"], line.get("eval_loss")) for line in read_metrics_lines(path)]

    if learnt(whole) != learnt(folder):
        tally.failures.append(f"{changes}: losses differ from those of the undisturbed run")
    for path in (whole / "final").glob("*.safetensors"):
        if _weights(path) != _weights(folder / "final" / path.name):
            tally.failures.append(f"{changes}: final {path.name} differs from that of the undisturbed run")


def _weights(path: Path) -> dict[str, bytes]:
    """By name; the header of the file has no fixed order."""
    from safetensors.numpy import load_file

    return {name: array.tobytes() for name, array in load_file(path).items()}


def _folder(folder: Path, job: Job) -> Path:
    folder.mkdir()
    write_job(folder / JOB_FILE, job.replace(**{"train.output_dir": str(folder)}))
    return folder


def _start(folder: Path, *, resume: bool) -> int:
    """Train in a process and process group of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        from memplan.train.worker import run_job

        code = run_job(folder, resume=resume)
    finally:
        os._exit(code)


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill_after(pid: int, seconds: float | None) -> int | None:
    """Kill the group of `pid` after a time; None if that ended it, else the exit code that it had by then."""
    if seconds is None:
        return _wait(pid)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)  # it has not come to setsid yet
    code = _wait(pid)
    return None if code == -signal.SIGKILL else code


def _load_libraries() -> None:
    """What a run imports, before any fork; one thread, since threads do not survive one."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import memplan.npt
    import memplan.train.worker  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
