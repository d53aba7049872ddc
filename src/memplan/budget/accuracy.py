"""How far estimates were off measurements so far, as the band around a need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memplan.budget.result import ErrorBand
from memplan.job.spec import Job

_FILE = Path(__file__).parent.parent / "profiles" / "accuracy.json"


def error_band(job: Job, need_bytes: int, non_torch_bytes: int, *, engine: str = "shape") -> ErrorBand:
    """
    Where the truth lies: the recorded errors of jobs of this method (of all, where too few were recorded), applied to
    what is inside torch's allocator. On one GPU those of a trace count traced runs too. `profiles/accuracy.json` is
    written by `python -m benchmarks.accuracy`.
    """
    recorded: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    keys = ["sharded"] if job.world_size > 1 else [job.method]
    if engine == "trace" and job.world_size == 1:
        keys = [f"trace-{job.method}", job.method, "trace-all"]
    entry = next((recorded[key] for key in keys if key in recorded), recorded["all"])
    inside = need_bytes - non_torch_bytes
    return ErrorBand(
        low_bytes=non_torch_bytes + int(inside * (1 + entry["low"])),
        high_bytes=non_torch_bytes + int(inside * (1 + entry["high"])),
        source=entry["source"],
    )
