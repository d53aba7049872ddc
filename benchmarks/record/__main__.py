"""
`python -m benchmarks.record`: real steps beside their plans, on the GPU at hand.

    --output DIR --minutes 9          probes, the matrix, the ways of loading, as far as the time reaches
    --output DIR --resume             go on where the last call was cut off
    --output DIR --probes             the probes alone
    --analyse DIR [--details]         records and probes of DIR against what memplan says today
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.record.analysis import analyse
from benchmarks.record.matrix import FILE, load_matrix
from benchmarks.record.runner import Clock, run_matrix, write_archive
from memplan.record.analyse import ENGINES

PROBES = "probes.json"
LOADING_SECONDS = 60
LOADING_WAYS = ("device_map", "to", "trainer")
"""Those of benchmarks.record.loading, which imports torch."""
MAX_RESTARTS = 6
"""Cases of the probes that may end their process before the rest is given up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, help="folder of the records")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything [9]")
    parser.add_argument("--resume", action="store_true", help="leave out what is there already")
    parser.add_argument("--probes", action="store_true", help="the probes alone")
    parser.add_argument("--probe-seconds", type=float, default=120.0, help="at most for the probes [120]")
    parser.add_argument("--only", default="*", help="cells whose names match, such as 'llama-*'")
    parser.add_argument("--matrix", type=Path, default=FILE, help="other jobs")
    parser.add_argument("--archive", type=Path, help="zip file of all records, whole after every cell")
    parser.add_argument("--list", action="store_true", help="print the cells")
    parser.add_argument("--analyse", type=Path, metavar="DIR", help="records against what memplan says today")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="what plans for --analyse [auto]")
    parser.add_argument("--details", action="store_true", help="every differing storage")
    options = parser.parse_args(arguments)
    if options.analyse is not None:
        for line in analyse(options.analyse, details=options.details, engine=options.engine):
            print(line)
        return 0
    cells = [cell for cell in load_matrix(options.matrix) if fnmatch.fnmatchcase(cell.name, options.only)]
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    if options.output is None:
        parser.error("give --output DIR, or --analyse DIR")
    clock = Clock(60 * options.minutes)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.probes or options.only == "*":
        run_probes(options.output / PROBES, min(options.probe_seconds, clock.left()), resume=options.resume)
    if not options.probes:
        run_matrix(cells, options.output, clock, resume=options.resume, archive=options.archive)
        if options.only == "*" and clock.left() > LOADING_SECONDS:
            run_loading(options.output, clock, resume=options.resume)
    if options.archive is not None:
        write_archive(options.output, options.archive)
    return 0


def run_probes(path: Path, seconds: float, *, resume: bool = False) -> None:
    """The probes in a process of their own, begun again behind a case that ended it."""
    clock = Clock(seconds)
    if resume and path.exists() and '"finished":true' in path.read_text(encoding="utf-8"):
        return
    began = time.monotonic()
    for restart in range(MAX_RESTARTS):
        command = [sys.executable, "-m", "benchmarks.record.probes", str(path)]
        command += ["--seconds", str(max(1.0, clock.left()))]
        command += ["--resume"] if resume or restart else []
        try:
            code = _run(command, clock.left() + 30)
        except subprocess.TimeoutExpired:
            print("probes: not done in time; what was found until then is in the file", file=sys.stderr)
            return
        if code == 0:
            break
        print(f"probes: a case ended the process ({code}); going on behind it", file=sys.stderr)
        if clock.left() < 1:
            break
    print(f"probes: {time.monotonic() - began:.0f} s, {path}", flush=True)


def run_loading(folder: Path, clock: Clock, *, resume: bool = False) -> None:
    """Each way of loading a checkpoint, in a process of its own, into `folder`/loading-WAY.json."""
    ways = [way for way in LOADING_WAYS if not (resume and (folder / f"loading-{way}.json").exists())]
    if not ways:
        return
    began = time.monotonic()
    with TemporaryDirectory(prefix="memplan-") as model:
        for way in ("save", *ways):
            command = [sys.executable, "-m", "benchmarks.record.loading"]
            command += [str(folder / f"loading-{way}.json"), way, model]
            try:
                code = _run(command, min(LOADING_SECONDS, clock.left()))
            except subprocess.TimeoutExpired:
                code = -1
            if code != 0:
                print(f"loading: `{way}` did not end well ({code})", file=sys.stderr)
                if way == "save":
                    return
    print(f"loading: {time.monotonic() - began:.0f} s", flush=True)


def _run(command: list[str], seconds: float) -> int:
    """The exit code of a quiet process; raises TimeoutExpired."""
    environment = {"KINETO_LOG_LEVEL": "99", "TRANSFORMERS_VERBOSITY": "error", **os.environ}
    return subprocess.run(
        command, env=environment, timeout=max(1.0, seconds), check=False, stdin=subprocess.DEVNULL
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
