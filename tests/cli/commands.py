"""Running `memplan` in this process and in another one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import memplan
from memplan.cli import main

SOURCE = str(Path(memplan.__file__).parents[1])


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


def run(*arguments: str) -> Outcome:
    """A command in this process: quick, and its parts can be replaced."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main(arguments)
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def run_process(*arguments: str, **environ: str) -> Outcome:
    """A command as a shell would run it."""
    done = subprocess.run(
        [sys.executable, "-m", "memplan", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=process_environ(**environ),
        timeout=600,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def process_environ(**changes: str) -> dict[str, str]:
    """Our environment, with this memplan in front."""
    return {**os.environ, "PYTHONPATH": SOURCE, "PYTHONIOENCODING": "utf-8", **changes}
