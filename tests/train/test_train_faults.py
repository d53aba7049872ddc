"""A handful of kills at random moments; `python -m benchmarks.faults` does hundreds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.torch
def test_killed_runs_lose_nothing() -> None:
    """After SIGKILL every checkpoint verifies, and the resumed run is the undisturbed one, bit for bit."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--kills", "3", "--jobs", "1"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600,
    )

    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith("3 kills, ")
    assert done.stdout.rstrip().endswith(" 0 failures")
