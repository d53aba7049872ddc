"""`memplan train` as a shell starts it, and how far it has come."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import memplan

SOURCE = Path(memplan.__file__).parent.parent
GUARD_SECONDS = 1800.0
"""More than any wait takes where every core is wanted by others as well: a guard against waiting for ever."""
ENDLESS = 1_000_000
"""Optimizer steps of a run that does not end by itself before it is told to."""


def environment(*folders: Path) -> dict[str, str]:
    """Ours, with this memplan in front, and one thread."""
    path = os.pathsep.join(map(str, [SOURCE, *folders]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextmanager
def running(arguments: Sequence[str], folder: Path, *, steps: int) -> Iterator[subprocess.Popen[str]]:
    """
    `memplan` with these arguments, once it has done so many steps of the run in `folder`, or has ended. What is still
    there when the block ends is killed.
    """
    command = [sys.executable, "-m", "memplan", *arguments]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        metrics, ends_at = folder / "metrics.jsonl", time.monotonic() + GUARD_SECONDS
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= steps):
            assert time.monotonic() < ends_at, f"no {steps} steps after {GUARD_SECONDS:.0f} s"
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def ranks(pid: int) -> dict[int, int]:
    """The processes that a launcher has started, by their rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        stat = _stat(int(path.name))
        if stat is not None and int(stat[1]) == pid:
            variables = dict(
                entry.split("=", 1) for entry in (path / "environ").read_text().split("\0") if entry
            )
            found[int(variables["RANK"])] = int(path.name)
    return found


def started_at(pid: int) -> str | None:
    """When a process was started, which tells it from a later one of its number; None where there is none."""
    stat = _stat(pid)
    return stat[19] if stat is not None else None


def _stat(pid: int) -> list[str] | None:
    """What /proc says about a process behind its name (state, parent ...); None where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
