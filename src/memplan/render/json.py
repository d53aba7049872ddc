"""Reports as one JSON object, the same keys for every command and flag; bytes are integers."""

from __future__ import annotations

from typing import Any

from memplan.render.report import Report


def report_object(report: Report) -> dict[str, Any]:
    """
    The result, with what a preflight found on this machine and the frontier that `fit --maximize` found.

    `preflight` and `frontier` are always there, null where the command did not ask.
    """
    from dataclasses import asdict

    return {
        **report.result.to_json(),
        "preflight": None if report.preflight is None else report.preflight.to_json(),
        "frontier": None if report.frontier is None else asdict(report.frontier),
    }


def dump(value: Any) -> str:
    """Indented JSON text, ASCII only, ending in a newline."""
    import json

    return json.dumps(value, indent=2) + "\n"
