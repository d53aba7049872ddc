"""Reports as GitHub-flavoured markdown: the headline first, the breakdown folded away."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.budget.result import Result
from memplan.render.report import Report
from memplan.render.screen import gib
from memplan.render.words import (
    CATEGORY_NAMES,
    PHASE_NAMES,
    band,
    categories_in,
    category_bytes,
    headline,
    is_lint,
    job_phrase,
    peak_moment,
    set_flags,
    subject,
    tensor_phrase,
    tier_words,
    worst_phases,
)
from memplan.units import format_bytes

MARKS = {"fits": "✅", "tight": "⚠️", "does_not_fit": "❌", "unknown": "❔"}


def report_markdown(report: Report) -> str:
    """The whole report; every number of the text screen but the timeline."""
    result = report.result
    state, sentence = headline(result)
    mark = f"{MARKS[result.verdict.state]} " if result.verdict else ""
    parts = [
        f"### memplan {report.command}: {mark}{state}",
        f"{code(subject(result))}: {sentence}",
        f"Peak {peak_moment(result.peak)} at {code(result.peak.where)}, {band(result)}",
    ]
    if result.job is not None:
        parts.append(f"Job: {_inline(job_phrase(result.job))}")
    if result.changes is not None:
        parts.append(_changes(report))
    if report.frontier is not None and report.frontier.value is not None:
        frontier = report.frontier
        parts.append(f"Largest {code(frontier.field)} that fits: **{frontier.value}**")
    if report.preflight is not None:
        from memplan.render.preflight_text import check_lines

        parts.append("\n".join(f"* **{label}**: {_inline(text)}" for label, text in check_lines(report)))
    parts.append(folded("Where the bytes are", [_phases(result), _totals(result), _top(result)]))
    if result.warnings:
        marks = ["⚠️ " if is_lint(message) else "" for message in result.warnings]
        parts.append("\n".join(f"* {mark}{_inline(text)}" for mark, text in zip(marks, result.warnings)))
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """A markdown table; cells must not hold line breaks."""
    rule = ["---:" if index in right else "---" for index in range(len(header))]
    return "\n".join("| " + " | ".join(_inline(cell) for cell in row) + " |" for row in (header, rule, *rows))


def _changes(report: Report) -> str:
    result = report.result
    if not result.changes:
        return "Nothing that memplan knows to change makes it fit."
    if not result.changes[0].set:
        return "Nothing to change."
    rows = []
    for change in result.changes:
        cut = report.truncation(change)
        costs = tier_words(change) + (f", truncates {cut[0]:,} of {cut[1]:,} samples" if cut else "")
        rows.append(
            [
                change.summary,
                gib(change.need_bytes),
                gib(change.headroom_bytes),
                f"x {change.slowdown:.2f}",
                costs,
                code(set_flags(change.set)),
            ]
        )
    header = ("change, smallest first", "need GiB", "to spare", "step time", "costs", "paste")
    return table(header, rows, right=(1, 2, 3))


def _phases(result: Result) -> str:
    phases = worst_phases(result)
    if not phases:
        return ""
    header = ["GiB", *(PHASE_NAMES.get(phase.phase, phase.phase) for phase in phases)]
    rows = [
        [CATEGORY_NAMES.get(name, name), *(gib(category_bytes(phase, name)) for phase in phases)]
        for name in categories_in(phases)
    ]
    rows.append(["**allocated**", *(gib(phase.allocated_peak_bytes) for phase in phases)])
    rows.append(["reserved", *(gib(phase.reserved_bytes) for phase in phases)])
    return table(header, rows, right=range(1, len(header)))


def _totals(result: Result) -> str:
    peak = result.peak
    rows = [
        ["need", format_bytes(result.need_bytes)],
        ["allocated", format_bytes(peak.allocated_bytes)],
        ["reserved", format_bytes(peak.reserved_bytes)],
        ["non-torch", format_bytes(peak.non_torch_bytes)],
    ]
    if result.host is not None:
        rows.append(["host RAM", format_bytes(result.host.peak_bytes)])
    return table(("per GPU", ""), rows, right=(1,))


def _top(result: Result) -> str:
    if not result.top:
        return ""
    rows = [
        [
            gib(tensor.bytes),
            code(tensor.where),
            tensor_phrase(tensor),
            CATEGORY_NAMES.get(tensor.category, tensor.category),
        ]
        for tensor in result.top
    ]
    return table(("GiB", "tensor at the peak", "shape", "category"), rows, right=(0,))


def folded(summary: str, blocks: Sequence[str]) -> str:
    """Blocks behind a summary to click on; empty blocks are left out."""
    body = "\n\n".join(block for block in blocks if block)
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def _inline(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str) -> str:
    """Text as a code span; nothing for no text."""
    return f"`{text}`" if text else ""
