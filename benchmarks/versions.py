"""
What the installed torch, transformers and peft trace, beside what others did.

    python -m benchmarks.versions FILE              the grid, traced with what is installed; adds it to FILE
    python -m benchmarks.versions FILE --compare    the versions of the file beside the newest of them

The grid is every tiny model of the tests (`tests/tracing/tiny.py`) in three ways. A job that a version refuses is kept
with the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peft_table import installed_versions
from memplan.allocator import replay_with_need
from memplan.errors import MemplanError
from memplan.job.spec import Job
from memplan.tape.tape import WrittenTape

ROOT = Path(__file__).parents[1]
BIG_BYTES = 2048
"""Smaller tensors do not count as events here."""

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"method": "lora"},
    "lora, autocast, checkpointing": {
        "method": "lora", "dtype": "float32", "autocast": "bfloat16", "activation_checkpointing": "full",
    },
}  # fmt: skip


def trace_grid() -> dict[str, dict[str, Any]]:
    """By job: peak bytes and a digest of the events' sizes, or the reason of a refusal."""
    sys.path.insert(0, str(ROOT / "tests"))
    from memplan.tracing.writer import trace_job
    from tracing.tiny import CONFIGS, job

    results: dict[str, dict[str, Any]] = {}
    for model, config in CONFIGS.items():
        for way, fields in WAYS.items():
            asked = job(**fields)
            try:
                results[f"{model}: {way}"] = measure(asked, trace_job(asked, config))
            except MemplanError as error:
                results[f"{model}: {way}"] = {"refused": str(error)}
    return results


def measure(job: Job, written: WrittenTape) -> dict[str, Any]:
    """Peak allocated and reserved bytes, need, and a digest of the sizes of the larger events in order."""
    tape = written.flatten()
    result, need = replay_with_need(tape.events, tape.sizes, tape.streams, job.allocator)
    signed = [tape.sizes[event] if event > 0 else -tape.sizes[-event] for event in tape.events]
    big = [num_bytes for num_bytes in signed if abs(num_bytes) >= BIG_BYTES]
    return {
        "allocated_bytes": result.peak_allocated_bytes,
        "reserved_bytes": result.peak_reserved_bytes,
        "need_bytes": need,
        "events": hashlib.sha256(json.dumps(big).encode()).hexdigest()[:16],
    }


def keep(file: Path, versions: dict[str, str], jobs: dict[str, dict[str, Any]]) -> None:
    """Write the grid of these versions into the file, in place of what they gave before."""
    results = [kept for kept in _load(file) if kept["versions"] != versions]
    results.append({"versions": versions, "jobs": jobs})
    results.sort(key=lambda kept: [_numbers(version) for version in kept["versions"].values()])
    blocks = []
    for kept in results:
        lines = ",\n".join(
            f"    {json.dumps(job)}: {json.dumps(found)}" for job, found in kept["jobs"].items()
        )
        blocks.append(f'  {{"versions": {json.dumps(kept["versions"])}, "jobs": {{\n{lines}\n  }}}}')
    file.write_text("[\n" + ",\n".join(blocks) + "\n]\n", encoding="utf-8")


def compare(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line per version against the last of the file, and one per job whose peak differs."""
    base = results[-1]
    lines = []
    for kept in results:
        pairs = [
            (job, found, base["jobs"][job]) for job, found in kept["jobs"].items() if job in base["jobs"]
        ]
        both = [pair for pair in pairs if "refused" not in pair[1] and "refused" not in pair[2]]
        same = sum(found["events"] == other["events"] for _, found, other in both)
        shares = {job: found["allocated_bytes"] / other["allocated_bytes"] - 1 for job, found, other in both}
        differing = {job: share for job, share in shares.items() if share}
        names = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
        largest = max(map(abs, shares.values()), default=0.0)
        lines.append(
            f"{names}: {len(both)} of {len(pairs)} jobs, {same} with the same events, "
            f"{len(both) - len(differing)} with the same peak, largest difference {largest:.3%}"
        )
        lines += [f"    {job}: {share:+.3%}" for job, share in differing.items()]
        lines += [f"    {job}: {found['refused']}" for job, found, _ in pairs if "refused" in found]
    return lines


def _load(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    content: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trace and keep, or compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args(arguments)
    if not options.compare:
        keep(options.file, installed_versions(), trace_grid())
    print("\n".join(compare(_load(options.file))))


if __name__ == "__main__":
    main()
