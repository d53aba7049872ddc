"""
memplan's trainer beside transformers' Trainer with peft, and TRL's SFTTrainer where it is installed.
`python -m benchmarks.trainers`

The same job, weights, data and order; the trainers take turns, one optimizer step each. Writes docs/trainers.md; takes
some minutes. `--method lora` runs one of the two jobs, and the page says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.trainers import contest, page
from benchmarks.trainers.case import MINIATURE, Size
from benchmarks.trainers.child import Outcome

REPORT = contest.ROOT / "docs" / "trainers.md"


def run(method: str, size: Size, dtype: str) -> dict[str, Outcome]:
    """The outcomes of one job, by trainer."""
    wants = [name for name in contest.VARIANTS if contest.installed(name)]
    with TemporaryDirectory(prefix="memplan-") as folder:
        return contest.contest(Path(folder), method, size, dtype, wants=wants)


def main() -> None:
    """Run the jobs, print the tables, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=list(page.METHODS), help="only this job")
    parser.add_argument("--miniature", action="store_true", help="two tiny steps; the page is not written")
    arguments = parser.parse_args()
    size = MINIATURE if arguments.miniature else Size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    results = {}
    for method in [arguments.method] if arguments.method else page.METHODS:
        results[method] = run(method, size, dtype)
        print(f"{method}\n{page.table(results[method], device)}", flush=True)
    if not arguments.miniature:
        REPORT.write_text(page.render(results, size, device, dtype), encoding="utf-8")
        print(f"wrote {REPORT.relative_to(contest.ROOT)}")


if __name__ == "__main__":
    main()
