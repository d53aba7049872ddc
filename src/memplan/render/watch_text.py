"""A run as lines: one for a log, several for a screen that is drawn again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.render.words import PHASE_NAMES
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.train.run_folder import RunView

STATE_WORDS = {"out_of_memory": "out of memory", "killed": "killed without a word"}


def watch_line(view: RunView) -> str:
    """Everything that fits into one line."""
    words = [str(view.folder), STATE_WORDS.get(view.state, view.state), *_progress(view)]
    peak = _peak(view)
    if peak:
        words.append(peak)
    return "  ".join(words)


def watch_lines(view: RunView) -> list[str]:
    """The state of a run, its memory by phase, its checkpoints, and what went wrong."""
    lines = [f"{view.folder}  {STATE_WORDS.get(view.state, view.state)}"]
    progress = _progress(view)
    if progress:
        lines.append("  ".join(progress))
    planned, measured = view.planned_bytes(), view.measured_bytes()
    if planned or measured:
        lines += ["", f"{'peak allocated':<16}{'planned':>12}{'measured':>12}"]
        for phase in dict.fromkeys([*planned, *measured]):
            name = PHASE_NAMES.get(phase, phase)
            lines.append(f"{name:<16}{_cell(planned.get(phase)):>12}{_cell(measured.get(phase)):>12}")
    best = view.evaluations.best_step
    saved = [f"step {step}{' (best)' if step == best else ''}" for step in view.checkpoints]
    saved += ["final"] * view.has_final
    lines += ["", f"saved: {', '.join(saved) or 'nothing yet'}"]
    error = view.record.get("error")
    if error:
        lines.append(f"error: {error}")
    return lines


def duration(seconds: float) -> str:
    """
    A time to go, in its two largest units.

    >>> duration(42), duration(600), duration(3 * 3600 + 120), duration(2 * 86400)
    ('42 s', '10 min', '3 h 2 min', '2 d 0 h')
    """
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes:.0f} min"
    if days < 1:
        return f"{int(hours)} h {int(minutes) % 60} min"
    return f"{int(days)} d {int(hours) % 24} h"


def _progress(view: RunView) -> list[str]:
    if not view.lines:
        return []
    last = view.lines[-1]
    words = [f"step {last['step']}" + (f"/{view.max_steps}" if view.max_steps else "")]
    words.append(f"loss {last['loss']:.4g}")
    evaluations = view.evaluations.losses
    if evaluations:
        step = max(evaluations)
        words.append(f"eval loss {evaluations[step]:.4g} at step {step}")
    if view.tokens_per_s is not None:
        words.append(f"{view.tokens_per_s:,.0f} tokens/s")
    if view.seconds_left is not None:
        words.append(f"{duration(view.seconds_left)} left")
    return words


def _peak(view: RunView) -> str:
    planned = max(view.planned_bytes().values(), default=None)
    measured = max(view.measured_bytes().values(), default=None)
    if planned is None and measured is None:
        return ""
    return f"peak {_cell(measured)} (plan {_cell(planned)})"


def _cell(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else format_bytes(num_bytes)
