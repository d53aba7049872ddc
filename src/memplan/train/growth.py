"""Whether memory grows from step to step, where it should stand still."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from memplan.budget.result import Result
from memplan.render.words import CATEGORY_NAMES
from memplan.units import MiB, format_bytes

FIRST_STEP = 2
"""Optimizer states appear in step 1; from then on the same is alive between steps."""
NUM_STEPS = 5
"""A rise at every one of so many steps in a row is no coincidence."""
LEAST_BYTES = MiB
LASTING = ("weights", "quant_state", "adapters", "optimizer")
"""Categories of the plan that are alive between steps."""


def lasting_bytes(plan: Result) -> int:
    """What the plan holds between steps: weights, adapters and optimizer states."""
    last = max((line for line in plan.phases if line.phase == "optimizer_step"), key=lambda line: line.step)
    return sum(line.bytes for line in last.budget if line.category in LASTING)


@dataclass
class GrowthWatch:
    """Bytes that are alive after each step, and a warning, once, when they keep rising."""

    plan: Result | None
    inventory: Callable[[], Mapping[str, int]] = dict
    """Bytes of what belongs to the model and the optimizer, by the plan's category."""
    _before: Mapping[str, int] = field(default_factory=dict)
    _bytes: list[int] = field(default_factory=list)
    _has_warned: bool = False

    def add(self, step: int, live_bytes: int) -> str | None:
        """What to say after a step, when so many bytes are alive; None as long as there is nothing to say."""
        if step < FIRST_STEP or self._has_warned:
            return None
        if not self._bytes:
            self._before = self.inventory()
        self._bytes = [*self._bytes[-NUM_STEPS:], live_bytes]
        first, rise = self._bytes[0], live_bytes - self._bytes[0]
        rises = all(before < after for before, after in zip(self._bytes, self._bytes[1:]))
        if len(self._bytes) <= NUM_STEPS or not rises or rise < LEAST_BYTES:
            return None
        self._has_warned = True
        expected = f"; the plan holds {format_bytes(lasting_bytes(self.plan))}" if self.plan else ""
        return (
            f"memory grows: after each of the last {NUM_STEPS} steps more was alive than before, "
            f"{format_bytes(rise // NUM_STEPS)} a step, now {format_bytes(first + rise)}, where weights, adapters and "
            f"optimizer states should stand still{expected}; {self._culprits()}"
        )

    def _culprits(self) -> str:
        """Which categories have grown since `FIRST_STEP`, or that none has that is known."""
        now = self.inventory()
        grown = {name: now[name] - self._before.get(name, 0) for name in now}
        words = [
            f"{CATEGORY_NAMES[name]} by {format_bytes(num_bytes)}"
            for name, num_bytes in grown.items()
            if num_bytes > 0
        ]
        if words:
            return f"what grew since step {FIRST_STEP}: {', '.join(words)}"
        return f"none of {', '.join(CATEGORY_NAMES[name] for name in now)} grew: code keeps other tensors"
