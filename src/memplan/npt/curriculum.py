"""Whose hidden states blocks train on, step by step. No torch."""

from __future__ import annotations

from memplan.job.spec import Npt


def stream_at(npt: Npt, step: int, max_steps: int) -> str:
    """
    `teacher` or `student`: the stream of an optimizer step, counted from 1.

    With `npt.stream: curriculum` the share of teacher steps falls in a straight line from 1 at the first step to 0
    after `npt.curriculum_steps`, by default half of the run. Which steps they are is no matter of chance, so that a
    resumed run goes on as it would have: a step is the teacher's where the sum of shares so far, rounded up, grows.

    >>> "".join(stream_at(Npt(stream="curriculum", curriculum_steps=8), step, 100)[0] for step in range(1, 12))
    'tttstststss'
    """
    if npt.stream != "curriculum":
        return npt.stream
    length = npt.curriculum_steps or max(2, max_steps // 2)

    def teacher_steps(until: int) -> int:
        done = min(until, length)
        # The sum of 1 - i / length for i below `done`, rounded up.
        return -(-(2 * length * done - done * (done - 1)) // (2 * length))

    return "teacher" if teacher_steps(step) > teacher_steps(step - 1) else "student"
