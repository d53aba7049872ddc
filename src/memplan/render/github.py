"""
GitHub Actions: annotations for stdout, markdown for the step's summary, and the step's outputs.

Syntax of https://docs.github.com/actions/reference/workflow-commands-for-github-actions
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from memplan.render.report import Report
from memplan.render.words import headline, is_lint, peak_moment, set_flags
from memplan.units import MiB, format_bytes

_LEVELS = {"fits": "notice", "tight": "warning", "does_not_fit": "error", "unknown": "warning"}


def annotation_lines(report: Report) -> str:
    """Workflow commands, one per line: the verdict with its smallest change, the checks, every warning."""
    result = report.result
    state, sentence = headline(result)
    text = f"{state}: {sentence}\npeak {peak_moment(result.peak)}: {result.peak.where}"
    if result.changes and result.changes[0].set:
        change = result.changes[0]
        text += f"\nsmallest change: {change.summary} ({set_flags(change.set)})"
    level = _LEVELS[result.verdict.state] if result.verdict else "notice"
    lines = [annotation(level, text, file=report.job_path, title=f"memplan {report.command}")]
    if report.preflight is not None:
        from memplan.render.preflight_text import check_lines

        for label, sentence in check_lines(report):
            level = "error" if label == "disk" and not report.preflight.disk.is_enough else "notice"
            lines.append(annotation(level, sentence, file=report.job_path, title=f"memplan {label}"))
    for message in result.warnings:
        level = "warning" if is_lint(message) else "notice"
        lines.append(annotation(level, message, file=report.job_path, title="memplan"))
    return "\n".join(lines) + "\n"


def annotation(level: str, message: str, *, file: str | None = None, title: str | None = None) -> str:
    """
    One workflow command; what would end it early is escaped.

    >>> annotation("error", "100% full\\nof it", file="a,b.yaml")
    '::error file=a%2Cb.yaml::100%25 full%0Aof it'
    """
    properties = [("file", file), ("title", title)]
    given = ",".join(f"{name}={_escape_property(value)}" for name, value in properties if value)
    return f"::{level}{' ' + given if given else ''}::{_escape(message)}"


def write_files(report: Report, environ: Mapping[str, str]) -> None:
    """Append the summary and the outputs to the files that the runner names, where it names them."""
    if environ.get("GITHUB_STEP_SUMMARY"):
        from memplan.render.markdown import report_markdown

        _append(environ["GITHUB_STEP_SUMMARY"], report_markdown(report))
    if environ.get("GITHUB_OUTPUT"):
        _append(
            environ["GITHUB_OUTPUT"], "".join(f"{name}={value}\n" for name, value in outputs(report).items())
        )


def outputs(report: Report) -> dict[str, str]:
    """The step's outputs; sizes are whole MiB, empty where there is no number."""
    result = report.result
    verdict = result.verdict
    headroom = verdict.headroom_bytes if verdict else None
    return {
        "verdict": verdict.state if verdict else "",
        "fits": "" if verdict is None else str(verdict.state in ("fits", "tight")).lower(),
        "need-mib": str(-(-result.need_bytes // MiB)),
        "peak-mib": str(-(-result.peak.allocated_bytes // MiB)),
        "headroom-mib": "" if headroom is None else str(headroom // MiB),
        "need": format_bytes(result.need_bytes),
        "change": set_flags(result.changes[0].set) if result.changes else "",
    }


def _append(path: str, text: str) -> None:
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(text)


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape(text).replace(":", "%3A").replace(",", "%2C")
