"""What a run says while it runs and when it ends. All of it goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from memplan.budget.result import PhaseLine, Result, highest_by
from memplan.gpu.capacity import Capacity
from memplan.render.words import CATEGORY_NAMES
from memplan.train.growth import GrowthWatch
from memplan.train.history import EvaluationHistory
from memplan.train.record import PhasePeak, Record, highest_by_phase
from memplan.train.samples import Samples
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.train.measure import Meter

HELD_TO = 1.01
"""Measured over planned, up to which a run keeps its plan, however narrow the error band is."""
_LARGEST_LINES = 3


def plan_lines(plan: Result, device: str, *, num_ranks: int = 1) -> list[str]:
    """The plan before anything is loaded: its peak, where it is, and the largest lines of its budget; of every rank."""
    peak = plan.peak
    where = f"{_phase(peak.phase)} of step {peak.step}" if peak.step else "loading"
    each = f" on each of {num_ranks} processes" if num_ranks > 1 else ""
    lines = [
        f"plan on {device}: {format_bytes(peak.allocated_bytes)} allocated at the peak{each}, in {where}"
    ]
    if device != "cpu":
        memory = "memory of each GPU" if num_ranks > 1 else "GPU memory"
        lines.append(f"  needs {format_bytes(plan.need_bytes)} of {memory} in all")
    lines.append("  " + budget_words(plan.budget))
    return lines


def data_summary(samples: Samples, kinds: dict[str, int], tokenizer: str) -> dict[str, Any]:
    """What the record says of the data: documents by kind, samples and what was cut off or left out of them."""
    return {
        "documents": kinds,
        "samples": len(samples),
        "tokens": len(samples.tokens),
        "targets": sum(samples.targets),
        "truncated": samples.num_truncated,
        "left_out": samples.num_empty,
        "longest": samples.length(samples.longest(1)[0]),
        "tokenizer": tokenizer,
    }


def data_line(name: str, summary: dict[str, Any]) -> str:
    """The data in one sentence, e.g. `data: 8 samples of up to 53 tokens from 8 text rows (bytes)`."""
    kinds = ", ".join(
        f"{count:,} {kind}{'s' * (count != 1) if kind == 'file' else ' rows'}"
        for kind, count in summary["documents"].items()
    )
    words = f"{name}: {summary['samples']:,} samples of up to {summary['longest']:,} tokens from {kinds}"
    words += f" ({summary['tokenizer']})"
    if summary["targets"] < summary["tokens"] - summary["samples"]:
        words += f", loss on {summary['targets'] / summary['tokens']:.0%} of the tokens"
    if summary["truncated"]:
        words += f", {summary['truncated']:,} of them truncated"
    if summary["left_out"]:
        words += f", {summary['left_out']:,} left out with nothing to learn in them"
    return words


def budget_words(budget: Sequence[Any]) -> str:
    """The largest lines of a budget, e.g. `weights 0.46 GiB, logits and loss 0.11 GiB, the rest 12.00 MiB`."""
    ordered = sorted(budget, key=lambda line: line.bytes, reverse=True)
    words = [
        f"{CATEGORY_NAMES[line.category]} {format_bytes(line.bytes)}" for line in ordered[:_LARGEST_LINES]
    ]
    rest = sum(line.bytes for line in ordered[_LARGEST_LINES:])
    if rest:
        words.append(f"the rest {format_bytes(rest)}")
    return ", ".join(words)


def _perplexity(line: dict[str, Any]) -> str:
    """In brackets, beside that of the base for NPT layers; nothing where none was taken."""
    if "eval_perplexity" not in line:
        return ""
    base = f", base {line['eval_base_perplexity']:.4g}" if "eval_base_perplexity" in line else ""
    return f" (perplexity {line['eval_perplexity']:.4g}{base})"


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
            words.insert(1, f"eval loss {line['eval_loss']:.4g}{_perplexity(line)}")
        if peak_bytes is not None:
            words.append(f"peak {format_bytes(peak_bytes)}{self._planned}")
        text = "  ".join(words)
        if self._bar is not None:
            self._bar.update(self._task, completed=step - self.first + 1, words=text, step=step)
        elif step in (self.first, self.last) or (step - self.first + 1) % self._interval == 0:
            print(f"step {step}/{self.last}  {text}", file=self.file, flush=True)

    def say(self, sentence: str) -> None:
        """A sentence between the lines, above the bar."""
        if self._bar is not None:
            self._bar.console.print(sentence, markup=False, highlight=False)
        else:
            print(sentence, file=self.file, flush=True)

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


class Watch:
    """
    Looks at the memory of the first steps, and of all that follow: says once, as early as it can be said, how the run
    compares with its plan, and when memory keeps growing.
    """

    def __init__(
        self, plan: Result | None, record: Record, meter: Meter, inventory: Callable[[], Mapping[str, int]]
    ) -> None:
        self.plan = plan
        self.record = record
        self.meter = meter
        self._growth = GrowthWatch(plan, inventory)
        self._is_checked = False

    def after_step(self, step: int) -> list[str]:
        """Sentences to say after a step, mostly none."""
        sentences = []
        if step > 1 and not self._is_checked and self.meter.peak_bytes() is not None:
            self._is_checked = True
            peaks = self.meter.peaks()
            self.record.update(measured=measured_fields(peaks))
            sentences += first_steps_lines(self.plan, peaks)
        if self.meter.counts_allocations:
            warning = self._growth.add(step, self.meter.live_bytes())
            sentences += [f"warning: {warning}"] if warning else []
        return sentences


def measured_fields(peaks: Sequence[PhasePeak]) -> dict[str, Any]:
    """The record's `measured`."""
    highest = max(peaks, key=lambda peak: peak.allocated_peak_bytes, default=None)
    return {"phases": [asdict(peak) for peak in peaks], "peak": asdict(highest) if highest else None}


def first_steps_lines(plan: Result | None, peaks: Sequence[PhasePeak]) -> list[str]:
    """
    The measured peak of the first steps beside the plan's; where it is above what the plan's error band allows, or
    `HELD_TO` where that is more, which phase it is.
    """
    if plan is None or plan.error_band is None or not peaks:
        return []
    planned = {line.phase: line.allocated_peak_bytes for line in highest_planned(plan)}
    measured = {phase: peak.allocated_peak_bytes for phase, peak in highest_by_phase(peaks).items()}
    whole = max(measured.values())
    ratio = whole / plan.peak.allocated_bytes
    planned_words = format_bytes(plan.peak.allocated_bytes)
    line = f"first steps: {format_bytes(whole)} allocated at the peak, {planned_words} planned"
    allowed = max(plan.error_band.high_bytes / plan.need_bytes, HELD_TO)
    if ratio <= allowed:
        return [line]
    excess = {phase: measured[phase] - planned.get(phase, 0) for phase in measured}
    worst = max(excess, key=lambda phase: excess[phase])
    return [
        line,
        f"warning: that is {ratio - 1:.1%} above the plan, and {allowed - 1:.1%} would be in order; most of it in "
        f"{_phase(worst)} ({format_bytes(measured[worst])}, planned {format_bytes(planned.get(worst, 0))})",
    ]


def early_stop_line(history: EvaluationHistory, step: int) -> str:
    """Why a run ends before its last step."""
    best = history.best_step
    assert best is not None
    return (
        f"stopping after step {step}: {history.num_since_best} evaluations without a lower loss than "
        f"{history.losses[best]:.4g}, that of step {best}"
    )


def comparison_lines(plan: Result | None, peaks: Sequence[PhasePeak]) -> list[str]:
    """Peak allocated bytes per phase, planned and measured, and their ratio; of each the worst step of any rank."""
    measured = highest_by_phase(peaks)
    if not measured:
        return []
    planned = {line.phase: line.allocated_peak_bytes for line in highest_planned(plan)} if plan else {}
    num_ranks = len({peak.rank for peak in peaks})
    heading = "peak allocated" if num_ranks == 1 else f"peak, highest of {num_ranks} ranks"
    rows = [(heading, "planned", "measured", "measured/planned")]
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
    return list(highest_by(plan.phases, lambda line: line.phase).values())


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
