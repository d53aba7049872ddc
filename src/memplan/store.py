"""
What runs on this machine took: a line per completed run in `runs.jsonl`, for the next time the job is asked about.

The file lies in `$MEMPLAN_HOME`, or else in `$XDG_DATA_HOME/memplan` (`~/.local/share/memplan`). An empty MEMPLAN_HOME
switches it off. Nothing in it leaves the machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memplan.job.fields import field_value, job_fields
from memplan.job.spec import Job
from memplan.model.architecture import Architecture

FILE = "runs.jsonl"
_NOT_MEMORY = ("model", "weights", "data.", "train.", "gpu", "margin", "loop", "load.")
_MEMORY = ("data.eval", "train.max_grad_norm", "train.weight_decay")
"""Fields outside those that decide memory after all, by being set or not."""


def store_path(environment: Mapping[str, str]) -> Path | None:
    """The file of finished runs; None if there is to be none."""
    home = environment.get("MEMPLAN_HOME")
    if home is not None:
        return Path(home) / FILE if home.strip() else None
    base = environment.get("XDG_DATA_HOME") or environment.get("HOME")
    if not base:
        return None
    folder = Path(base) if environment.get("XDG_DATA_HOME") else Path(base) / ".local" / "share"
    return folder / "memplan" / FILE


def fingerprint(job: Job, architecture: Architecture) -> str:
    """Equal for jobs that take the same memory: what decides it of the job and of the model, not their names."""
    model = {name: value for name, value in asdict(architecture).items() if name not in ("name", "source")}
    fields: dict[str, Any] = {
        name: _plain(field_value(job, name)) for name in job_fields() if not name.startswith(_NOT_MEMORY)
    }
    fields |= {name: bool(field_value(job, name)) for name in _MEMORY}
    import hashlib  # slow to import, and of no use where nothing is stored

    text = json.dumps([model, fields], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """8 and 8.0 are the same setting."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def remember_run(path: Path | None, record: Mapping[str, Any], key: str) -> None:
    """
    Append what a completed run measured. A store that cannot be written is nobody's trouble: the run is done.

    Args:
        record: the fields of its `record.json`.
        key: its `fingerprint`.
    """
    peak = (record.get("measured") or {}).get("peak")
    if path is None or peak is None:
        return
    plan = record.get("plan") or {}
    summary = {
        "schema_version": 1,
        "fingerprint": key,
        "model": record["job"]["model"],
        "device": record["device"],
        "versions": record["versions"],
        "planned_bytes": (plan.get("peak") or {}).get("allocated_bytes"),
        "measured_bytes": peak["allocated_peak_bytes"],
        "measured_reserved_bytes": peak.get("reserved_bytes"),
        "finished_at": record["finished_at"],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(summary) + "\n")
    except OSError:
        return


def past_runs(path: Path | None, key: str) -> list[dict[str, Any]]:
    """The newest run of this fingerprint on each device, oldest first; lines that cannot be read are left out."""
    if path is None:
        return []
    newest: dict[str, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            run = json.loads(line)
            if run["fingerprint"] == key:
                name = str(run["device"]["name"])
                newest.pop(name, None)
                newest[name] = run
        except (ValueError, KeyError, TypeError):
            continue
    return list(newest.values())


def past_run_words(run: Mapping[str, Any]) -> str:
    """
    One past run in a sentence.

    >>> past_run_words({"measured_bytes": 3 << 30, "device": {"name": "X1"}, "versions": {"torch": "2.13"},
    ...                 "finished_at": "2026-01-02T03:04:05+00:00"})
    'measured here before: 3.00 GiB allocated at the peak on X1, torch 2.13, 2026-01-02'
    """
    from memplan.units import format_bytes

    day = str(run["finished_at"]).partition("T")[0]
    return (
        f"measured here before: {format_bytes(run['measured_bytes'])} allocated at the peak on "
        f"{run['device']['name']}, torch {run['versions'].get('torch', '?')}, {day}"
    )
