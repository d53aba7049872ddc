"""
Published runs of litgpt on one GPU, traced with litgpt's own model code and Lightning's Fabric.

    python -m benchmarks.litgpt CLONE        # a clone of github.com/Lightning-AI/litgpt

Takes the code of the commits that ran (`benchmarks.litgpt_runs`) out of the clone, traces their step
(`benchmarks.litgpt_step`) with the installed torch, Lightning and bitsandbytes, and writes `data/litgpt_traced.json`,
with their versions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.litgpt_runs import RUNS

FILE = Path(__file__).parent / "data" / "litgpt_traced.json"
PACKAGES = ("torch", "lightning", "bitsandbytes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trace them and write the file."""
    from benchmarks.clones import code_of, write_traced
    from benchmarks.litgpt_step import trace_litgpt

    parser = argparse.ArgumentParser(prog="python -m benchmarks.litgpt", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("clone", type=Path, metavar="CLONE")
    options = parser.parse_args(arguments)
    traced = {}
    for name, run in RUNS.items():
        with code_of(options.clone, run.commit, run.package):
            traced[name] = trace_litgpt(run)
        print(f"{name}: {traced[name]['allocated'] / 1e9:.3f} GB", flush=True)
    write_traced(FILE, PACKAGES, traced)


if __name__ == "__main__":
    main()
