"""Budget against capacity."""

from __future__ import annotations

from dataclasses import replace

from memplan.budget.result import Result, Verdict
from memplan.errors import JobError
from memplan.gpu.capacity import Capacity
from memplan.units import format_bytes, parse_bytes


def judge(result: Result, capacity: Capacity | None, margin: str | None = None) -> Verdict:
    """
    Whether the job of `result` fits on `capacity`.

    The need is a range: the error band (of a recording, which has none, the need alone), or from the need to the need
    plus `margin` where one is given. `fits`
    when all of it is within the usable bytes, `does_not_fit` when none of it is, `tight` in between. Without
    a capacity the verdict is `unknown`. The headroom is always usable less need, and negative where the need
    itself is too large.

    Raises:
        JobError: `margin` is neither a percentage nor a size.
    """
    need = result.need_bytes
    if capacity is None:
        return Verdict(
            "unknown", None, f"needs {format_bytes(need)}, and there is no capacity to compare it with"
        )
    usable = capacity.usable_bytes
    low, high = _range(result, margin)
    headroom = usable - need
    room = f"the {format_bytes(usable)} usable on {capacity.gpu}"
    if capacity.used_by_others_bytes:
        room += f" ({format_bytes(capacity.used_by_others_bytes)} held by others)"
    if high <= usable:
        reason = f"needs {format_bytes(need)} of {room}, {format_bytes(headroom)} to spare"
        return Verdict("fits", headroom, reason)
    if low > usable:
        return Verdict(
            "does_not_fit",
            headroom,
            f"needs {format_bytes(need)}, {format_bytes(-headroom)} more than {room}",
        )
    if headroom >= 0:
        edge = "the error band" if margin is None else f"its margin of {margin}"
        reason = f"needs {format_bytes(need)} of {room}, but {edge} reaches {format_bytes(high)}"
    else:
        reason = (
            f"needs {format_bytes(need)}, {format_bytes(-headroom)} more than {room}, "
            f"but the error band starts at {format_bytes(low)}"
        )
    return Verdict("tight", headroom, reason)


def margin_bytes(margin: str, need_bytes: int) -> int:
    """
    Bytes of a margin: `5%` of the need, or a size.

    Raises:
        JobError: `margin` is neither.

    >>> margin_bytes("5%", 1000), margin_bytes("1KiB", 1000)
    (50, 1024)
    """
    text = margin.strip()
    number = text.removesuffix("%").strip()
    if text.endswith("%") and number.replace(".", "", 1).isdigit():
        return int(need_bytes * float(number) / 100)
    size = parse_bytes(text)
    if size is None:
        raise JobError(
            f"`margin` is `{margin}`, which is neither a percentage nor a size",
            hint="write it as `margin: 5%` or `margin: 1GiB`",
        )
    return size


def less_margin(capacity: Capacity, margin: str | None) -> Capacity:
    """
    The capacity that a job may fill when it must leave its `margin` free; the same without one.

    A need that fits in it fits in `capacity` with the margin added: need * (1 + p) <= usable, or need + size
    <= usable.
    """
    if margin is None:
        return capacity
    usable = capacity.usable_bytes
    extra = margin_bytes(margin, usable)
    room = usable * usable // (usable + extra) if margin.strip().endswith("%") else usable - extra
    return replace(capacity, usable_bytes=room)


def _range(result: Result, margin: str | None) -> tuple[int, int]:
    if margin is not None:
        return result.need_bytes, result.need_bytes + margin_bytes(margin, result.need_bytes)
    if result.error_band is None:
        return result.need_bytes, result.need_bytes
    return result.error_band.low_bytes, result.error_band.high_bytes
