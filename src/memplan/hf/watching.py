"""What a Trainer's run really takes, per phase, measured while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memplan.budget.result import PhaseLine, Result
from memplan.render.screen import columns
from memplan.render.words import PHASE_NAMES, worst_phases
from memplan.tape.tape import PHASES
from memplan.train.measure import PROFILED_STEPS, make_meter
from memplan.train.record import PhasePeak, highest_by_phase
from memplan.units import format_bytes


@dataclass(frozen=True)
class Measured:
    """Peaks of a run so far. On CUDA those of all steps, on the CPU of the first few."""

    phases: tuple[PhasePeak, ...]
    steps: int
    """Optimizer steps that were measured."""

    @property
    def allocated_peak_bytes(self) -> int:
        """The most that tensors took at once."""
        return max(peak.allocated_peak_bytes for peak in self.phases)

    @property
    def reserved_peak_bytes(self) -> int | None:
        """The most that the caching allocator held; None on the CPU."""
        return max(
            (peak.reserved_bytes for peak in self.phases if peak.reserved_bytes is not None), default=None
        )


class Watch:
    """Measures a Trainer from now on. Its methods are wrapped, on this object alone, until `close`."""

    def __init__(self, trainer: Any, others: list[Any]) -> None:
        self._undo: list[Callable[[], None]] = []
        self._has_begun = False
        self._steps = 0
        self._trainer = trainer
        self._meter = make_meter(trainer.args.device)
        self._on_gpu = trainer.args.device.type == "cuda"
        try:
            self._meter.begin("load", 0)
            self._meter.adopt(trainer.model, others)
            self._wrap(trainer, "get_batch_samples", before=self._begin_step)
            self._wrap(trainer, "training_step", before=self._begin_micro_batch, after=self._end_micro_batch)
            self._wrap(trainer, "evaluate", before=lambda: self._begin("evaluation", 0))
            self._wrap(trainer.accelerator, "backward", before=lambda: self._begin("backward"))
        except BaseException:
            self.close()
            raise

    def end_step(self) -> None:
        """An optimizer step is over."""
        self._steps += 1
        self._meter.end_step(self._trainer.state.global_step)

    def measured(self) -> Measured | None:
        """What was measured so far; None before the first step is over."""
        if not self._steps:
            return None
        peaks = tuple(self._meter.peaks())
        steps = self._steps if self._on_gpu else min(self._steps, PROFILED_STEPS)
        return Measured(peaks, steps) if peaks else None

    def close(self) -> None:
        """Stop measuring, and leave the Trainer as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        self._meter.peaks()  # ends the profiler on the CPU

    def _begin(self, phase: str, ahead: int = 1) -> None:
        self._meter.begin(phase, self._trainer.state.global_step + ahead)

    def _begin_step(self) -> None:
        """All micro batches of a step go to the device before the first of them is used."""
        self._begin("forward")
        self._has_begun = True

    def _begin_micro_batch(self) -> None:
        if not self._has_begun:
            self._begin("forward")
        self._has_begun = False

    def _end_micro_batch(self) -> None:
        if self._trainer.accelerator.sync_gradients:
            self._begin("optimizer_step")

    def _wrap(
        self, owner: Any, name: str, *, before: Callable[[], None], after: Callable[[], None] | None = None
    ) -> None:
        method = getattr(owner, name)
        is_own = name in vars(owner)

        def watched(*positional: Any, **options: Any) -> Any:
            quietly(before)
            result = method(*positional, **options)
            if after is not None:
                quietly(after)
            return result

        setattr(owner, name, watched)
        self._undo.append(lambda: setattr(owner, name, method) if is_own else delattr(owner, name))


def quietly(action: Callable[[], None]) -> None:
    """A measurement that fails is a measurement less, and nothing to the run."""
    try:
        action()
    except Exception:
        return


def comparison(result: Result, measured: Measured) -> list[str]:
    """
    Lines of a table: the highest moment of each phase as planned and as measured, and how far apart they are. The peaks
    below are those of the phases that were planned: evaluation is not.
    """
    planned = {line.phase: line for line in worst_phases(result)}
    found = highest_by_phase(measured.phases)
    both = [name for name in PHASES if name in planned and name in found and name != "load"]
    rows = [
        _row(PHASE_NAMES.get(name, name), _allocated(planned.get(name)), found[name].allocated_peak_bytes)
        for name in [*both, *(name for name in found if name not in planned)]
    ]
    peaks = [peak for peak in measured.phases if peak.phase in both]
    if peaks:
        highest = max(peak.allocated_peak_bytes for peak in peaks)
        rows.append(_row("peak allocated", result.peak.allocated_bytes, highest))
    reserved = [peak.reserved_bytes for peak in peaks if peak.reserved_bytes is not None]
    if reserved:
        rows.append(_row("peak reserved", result.peak.reserved_bytes, max(reserved)))
    title = f"memplan, {measured.steps} step{'s' * (measured.steps != 1)}"
    return columns([(title, "planned", "measured", "planned / measured - 1"), *rows], right=(1, 2, 3))


def _allocated(line: PhaseLine | None) -> int | None:
    return None if line is None else line.allocated_peak_bytes


def _row(name: str, planned: int | None, measured: int) -> tuple[str, str, str, str]:
    if planned is None or not measured:
        return name, "-" if planned is None else format_bytes(planned), format_bytes(measured), "-"
    return name, format_bytes(planned), format_bytes(measured), f"{planned / measured - 1:+.2%}"
