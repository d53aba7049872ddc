"""
What an answer costs in CPU time, beside limits and beside what any command line costs. `python -m benchmarks.speed`

Whole processes by the operating system's accounting, alternating; the rest inside one process. Medians.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from memplan.budget.estimate import estimate, quick_need_bytes
from memplan.fit import smallest_changes
from memplan.gpu import resolve_capacity
from memplan.job.load import load_job
from memplan.job.spec import Job, Lora
from memplan.model import resolve_model
from memplan.model.resolve import resolve_config

RUNS = 9
TRACES = 3
JOB = """\
model: meta-llama/Llama-3.1-8B
method: lora
max_seq_len: 4096
activation_checkpointing: full
lora: {rank: 16}
"""
MULTIPLY = "import json; print(json.dumps(8030261248 * 2 + 41943040 * 16 + 32 * 4096 * 4096 * 2))"


def installed_environment() -> dict[str, str]:
    """
    That of this process, but modules are compiled once, as where memplan is installed: the first run of a command does
    not count.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def process_seconds(command: list[str]) -> float:
    """User and system time of a finished child."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=installed_environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def inside_seconds(answer: Callable[[], object], runs: int = RUNS) -> float:
    """CPU time of one answer in a warm process."""
    answer()
    times = []
    for _ in range(runs):
        start = time.process_time()
        answer()
        times.append(time.process_time() - start)
    return median(times)


def traced_process(job: Path) -> tuple[float, float]:
    """CPU seconds and resident MiB of a cold `memplan estimate --engine trace`."""
    code = "import resource, sys; from memplan.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
    code += "print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, file=sys.stderr)"
    command = [sys.executable, "-c", code, "estimate", str(job), "--engine", "trace"]
    done = subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
        env=installed_environment(),
    )
    seconds, mebibytes = map(float, done.stderr.split()[-2:])
    return seconds, mebibytes


def print_traces(path: Path) -> None:
    """
    Cold and warm traces, where torch, transformers and peft are installed. The limit on depth is on the trace, which
    runs equal blocks once; the replay of the tape follows every event of every layer, and so grows with depth.
    """
    from memplan.tracing.estimate import estimate_traced, missing_software

    if missing_software():
        print("\ntraces: torch, transformers or peft is not installed")
        return
    from memplan.tracing.writer import trace_job

    cold = [traced_process(path) for _ in range(TRACES + 1)][1:]
    job = load_job(str(path)).job
    config = dict(resolve_config(job.model, offline=True).config)
    deep = config | {"num_hidden_layers": 80}
    warm, warm_deep = (
        inside_seconds(partial(estimate_traced, job, model), TRACES) for model in (config, deep)
    )
    trace, trace_deep = (inside_seconds(partial(trace_job, job, model), TRACES) for model in (config, deep))
    lines: dict[str, tuple[float, float | None]] = {
        "cold process, CPU s": (median(seconds for seconds, _ in cold), 4.0),
        "cold process, MiB": (median(mebibytes for _, mebibytes in cold), 450.0),
        "warm, CPU s": (warm, 0.4),
        "warm, the trace alone, CPU s": (trace, None),
        "80 layers over 32, the trace alone": (trace_deep / trace, 1.2),
        "80 layers over 32, with the replay": (warm_deep / warm, None),
    }
    print(f"\n{'trace of the same job':40}{'':>8}{'limit':>8}")
    for name, (value, limit) in lines.items():
        print(f"{name:40}{value:8.2f}" + ("" if limit is None else f"{limit:8.1f}"))


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(JOB, encoding="utf-8")
        commands = {
            "memplan estimate, 8B LoRA": [sys.executable, "-m", "memplan", "estimate", str(path)],
            "import typer and yaml": [sys.executable, "-c", "import typer, yaml"],
            "multiply parameters by constants": [sys.executable, "-c", MULTIPLY],
            "start the interpreter": [sys.executable, "-c", "pass"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(RUNS + 1):
            for name, command in commands.items():
                times[name].append(process_seconds(command))
        medians = {name: median(values[1:]) for name, values in times.items()}
        print_traces(path)
    whole = medians["memplan estimate, 8B LoRA"]
    print(f"{'process':40}{'CPU ms':>8}{'limit':>8}{'ratio':>8}")
    for name, seconds in medians.items():
        limit = "300" if seconds is whole else ""
        print(f"{name:40}{seconds * 1e3:8.0f}{limit:>8}{whole / seconds:8.2f}")

    job = Job(model="", method="lora", max_seq_len=4096, activation_checkpointing="full", lora=Lora(rank=16))
    model = resolve_model("meta-llama/Llama-3.1-8B")
    field_job = load_job("qwen2.5-7b-lora-24gb-before").job
    field_model = resolve_model(field_job.model)
    card = resolve_capacity("RTX 4090")
    answers: dict[str, tuple[Callable[[], object], int, int]] = {
        "allocated peak": (lambda: quick_need_bytes(job, model), 20, RUNS),
        "everything, every event replayed": (lambda: estimate(job, model), 150, RUNS),
        "fit, the smallest change": (
            lambda: smallest_changes(field_job, field_model, card, num_results=1),
            2000,
            3,
        ),
        "fit, with runners-up": (lambda: smallest_changes(field_job, field_model, card), 2000, 3),
    }
    print(f"\n{'in one process':40}{'CPU ms':>8}{'limit':>8}{'ratio':>8}")
    for name, (answer, limit_ms, runs) in answers.items():
        milliseconds = inside_seconds(answer, runs) * 1e3
        print(f"{name:40}{milliseconds:8.1f}{limit_ms:8}{milliseconds / limit_ms:8.2f}")


if __name__ == "__main__":
    main()
