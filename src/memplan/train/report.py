"""What a run says while it runs and when it ends. All of it goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from memplan.budget.result import Capacity, PhaseLine, Result
from memplan.train.record import PhasePeak, highest_by_phase
from memplan.units import format_bytes

_LARGEST_LINES = 3


def say(text: str = "") -> None:
    """One line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def plan_lines(plan: Result, device: str) -> list[str]:
    """The plan before anything is loaded: its peak, where it is, and the largest lines of its budget."""
    peak = plan.peak
    where = f"{_phase(peak.phase)} of step {peak.step}" if peak.step else "loading"
    lines = [f"plan on {device}: {format_bytes(peak.allocated_bytes)} allocated at the peak, in {where}"]
    if device != "cpu":
        lines.append(f"  needs {format_bytes(plan.need_bytes)} of GPU memory in all")
    lines.append("  " + budget_words(plan.budget))
    return lines


def budget_words(budget: Sequence[Any]) -> str:
    """The largest lines of a budget, e.g. `weights 0.46 GiB, activations 0.11 GiB, the rest 12.00 MiB`."""
    ordered = sorted(budget, key=lambda line: line.bytes, reverse=True)
    words = [f"{line.category} {format_bytes(line.bytes)}" for line in ordered[:_LARGEST_LINES]]
    rest = sum(line.bytes for line in ordered[_LARGEST_LINES:])
    if rest:
        words.append(f"the rest {format_bytes(rest)}")
    return ", ".join(words)


class Progress:
    """Loss, speed and memory as the run goes: a live bar on a terminal, else a plain line at every tenth."""

    def __init__(self, *, first: int, last: int, plan: Result | None, file: TextIO | None = None) -> None:
        self.file = file or sys.stderr
        self.first, self.last = first, last
        self._planned = f" (plan {format_bytes(plan.peak.allocated_bytes)})" if plan else ""
        self._bar: Any = self._make_bar() if self.file.isatty() else None
        self._interval = max(1, (last - first + 1) // 10)

    def step(self, step: int, line: dict[str, Any], peak_bytes: int | None) -> None:
        """
        Step `step` is done; `line` is its line of `metrics.jsonl`, `peak_bytes` the measured peak so far.
        """
        words = [f"loss {line['loss']:.4g}", f"{line['tokens_per_s']:,.0f} tokens/s"]
        errors = line.get("relative_error", {}).values()
        if errors:
            words.insert(1, f"relative error {sum(errors) / len(errors):.3g}")
        if "eval_loss" in line:
            words.insert(1, f"eval loss {line['eval_loss']:.4g}")
        if peak_bytes is not None:
            words.append(f"peak {format_bytes(peak_bytes)}{self._planned}")
        text = "  ".join(words)
        if self._bar is not None:
            self._bar.update(self._task, completed=step - self.first + 1, words=text, step=step)
        elif step in (self.first, self.last) or (step - self.first + 1) % self._interval == 0:
            print(f"step {step}/{self.last}  {text}", file=self.file, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _make_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        bar = Progress(
            TextColumn(f"step {{task.fields[step]}}/{self.last}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            TextColumn(
                "{task.fields[words]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
            TimeRemainingColumn(compact=True),
            expand=True,
            console=Console(file=self.file),
        )
        self._task = bar.add_task("", total=self.last - self.first + 1, words="", step=self.first - 1)
        bar.start()
        return bar


def comparison_lines(plan: Result | None, peaks: Sequence[PhasePeak]) -> list[str]:
    """Peak allocated bytes per phase, planned and measured, and their ratio; the worst step of each."""
    measured = highest_by_phase(peaks)
    if not measured:
        return []
    planned = {line.phase: line.allocated_peak_bytes for line in highest_planned(plan)} if plan else {}
    rows = [("peak allocated", "planned", "measured", "measured/planned")]
    for phase, peak in measured.items():
        rows.append((_phase(phase), *_compare(planned.get(phase), peak.allocated_peak_bytes)))
    whole = max(peak.allocated_peak_bytes for peak in measured.values())
    rows.append(("whole run", *_compare(plan.peak.allocated_bytes if plan else None, whole)))
    reserved = [peak.reserved_bytes for peak in measured.values() if peak.reserved_bytes is not None]
    if reserved:
        rows.append(("reserved", *_compare(plan.peak.reserved_bytes if plan else None, max(reserved))))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def highest_planned(plan: Result) -> list[PhaseLine]:
    """The worst step of each phase of a plan."""
    highest: dict[str, PhaseLine] = {}
    for line in plan.phases:
        known = highest.get(line.phase)
        if known is None or line.allocated_peak_bytes > known.allocated_peak_bytes:
            highest[line.phase] = line
    return list(highest.values())


def _compare(planned: int | None, measured: int) -> tuple[str, str, str]:
    if planned is None:
        return "unknown", format_bytes(measured), ""
    return format_bytes(planned), format_bytes(measured), f"{measured / planned:.3f}" if planned else ""


def out_of_memory_lines(
    plan: Result | None, phase: str, step: int, detail: str, capacity: Capacity
) -> list[str]:
    """
    When the run ran out of memory, what the plan said about that phase, and what there is.

    Args:
        detail: what the allocator said, in a few words.
        capacity: what is free now that the run has let go of its own.
    """
    when = f"in {_phase(phase)} of step {step}" if step else "while loading"
    lines = [f"error: out of memory {when}: {detail}"]
    if plan is not None:
        line = next((line for line in highest_planned(plan) if line.phase == phase), None)
        peak, budget = (
            (line.allocated_peak_bytes, line.budget) if line else (plan.peak.allocated_bytes, plan.budget)
        )
        lines.append(f"  planned for {_phase(phase)}: {format_bytes(peak)} allocated, {budget_words(budget)}")
    free = f"{format_bytes(capacity.usable_bytes)} of {format_bytes(capacity.total_bytes)} on {capacity.gpu}"
    others = f"; {format_bytes(capacity.used_by_others_bytes)} held by others" * (
        capacity.used_by_others_bytes > 0
    )
    return [*lines, f"  free for this run: {free}{others}"]


def resume_command(folder: Path) -> str:
    """What continues the run in `folder`, whatever flags it was started with."""
    import shlex

    job = folder / "job.yaml"
    shown = job.relative_to(Path.cwd()) if job.is_relative_to(Path.cwd()) else job
    return f"memplan train {shlex.quote(str(shown))} --resume"


def _phase(phase: str) -> str:
    return phase.replace("_", " ")
