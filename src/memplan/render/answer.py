"""What the functions for Python answer with: a result, and what is asked of it first."""

from __future__ import annotations

from dataclasses import dataclass

from memplan.budget.result import Result


@dataclass(frozen=True)
class Answer:
    """A result; `print` it for the screen of `memplan estimate`."""

    result: Result

    @property
    def peak_bytes(self) -> int:
        """Peak of the bytes that live tensors take: `torch.cuda.max_memory_allocated()`."""
        return self.result.peak.allocated_bytes

    @property
    def need_bytes(self) -> int:
        """The smallest memory of a GPU in which it all completes, what is outside torch included."""
        return self.result.need_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the need is within the GPU that it was compared with; None where there was none."""
        verdict = self.result.verdict
        return None if verdict is None else verdict.state in ("fits", "tight")

    def __str__(self) -> str:
        from memplan.render.screen import Screen
        from memplan.render.text import estimate_screen

        screen = Screen()
        estimate_screen(screen, self.result)
        return screen.plain().rstrip("\n")
