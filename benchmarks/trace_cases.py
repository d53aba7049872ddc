"""
Published runs traced one by one. `python -m benchmarks.trace_cases`

Those that both engines can plan: of one GPU, whose loop is a plain script and whose model code is that of transformers
5, as it is, without other kernels, and without a step in a function of its own. And those that are scripts
(`benchmarks.scripts`). Writes `data/traced_cases.json`, with the versions that were traced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peft_table import installed_versions
from benchmarks.published import Case, load_published
from memplan.allocator import replay
from memplan.model.resolve import resolve_config

FILE = Path(__file__).parent / "data" / "traced_cases.json"
TRANSFORMERS = "5."


def can_trace(case: Case) -> bool:
    """Whether a trace with transformers 5 runs what the case ran."""
    plain = case.gpus == 1 and not case.kernels and not case.completeness
    known = case.software.get("transformers", "").startswith(TRANSFORMERS) and not case.step_is_function
    return bool(case.fields) and plain and known and case.job.loop in ("script", "memplan")


def trace_case(case: Case) -> dict[str, int]:
    """Peaks by statistic, over the whole process or the scope of a script."""
    if case.script:
        from benchmarks.scripts import trace_script

        return trace_script(case)
    from memplan.tracing.writer import trace_job

    config = case.config or resolve_config(case.job.model, offline=True).config
    tape = trace_job(case.job, dict(config)).flatten()
    result = replay(tape.events, tape.sizes, tape.streams, case.job.allocator, marks=tape.marks)
    return {"allocated": result.peak_allocated_bytes, "reserved": result.peak_reserved_bytes}


def load_traced_cases(file: Path = FILE) -> dict[str, Any]:
    """`versions`, and `cases`: by id, bytes by statistic."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def main() -> None:
    """Trace them and write the file."""
    traced = {case.id: trace_case(case) for case in load_published() if case.script or can_trace(case)}
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(peaks)}" for name, peaks in traced.items())
    versions = json.dumps(installed_versions())
    FILE.write_text(f'{{\n  "versions": {versions},\n  "cases": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")
    print(f"traced {len(traced)} cases")


if __name__ == "__main__":
    main()
