"""
What a stack trace in a snapshot says about a storage: how plans write it, and how recordings are read.

Frames go from the innermost outwards. The viewer shows each as `filename:line:name`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from memplan.tape.tape import Mark, Storage

Frame = dict[str, Any]

UNKNOWN = "unknown"
"""The name of a storage whose allocation left no stack trace."""

_TENSOR = re.compile(r"(?P<dtype>[^\s\[]+)? ?(?P<shape>\[[\d, ]*\])?")
_MOMENT = re.compile(r"(?P<phase>.*) of step (?P<step>\d+)", re.DOTALL)
_NO_TENSOR = "-"

_TORCH = re.compile(
    r"(^|[/\\])torch[/\\]|(^|[/\\])(aten|c10|ATen)[/\\]|\.(c|cc|cpp|cu|cuh|h|hpp)$|^<(built-in|frozen)|^(\?\?)?$"
)
"""Files of torch, of the interpreter and of C++ libraries: what runs between a model and its allocations."""
_ALLOCATOR = re.compile(r"c10::|CachingAllocator|CapturedTraceback|unwind::|gather|_Py|Py[A-Z]\w*_|^\?\?$|^$")
_TORCH_PYTHON = re.compile(r"[/\\]torch[/\\].*\.py$")
_PACKAGES = re.compile(r".*[/\\](site-packages|dist-packages)[/\\]")


def moment(mark: Mark) -> str:
    """
    A phase and its step as text, e.g. `backward of step 2`; loading has no step.

    >>> moment(Mark(0, "load", 0)), moment(Mark(9, "backward", 2))
    ('load', 'backward of step 2')
    """
    return f"{mark.phase} of step {mark.step}" if mark.step else mark.phase


def parse_moment(text: str) -> tuple[str, int]:
    """
    (phase, step) of such a text; any other text is a phase without a step.

    >>> parse_moment("backward of step 2"), parse_moment("evaluation")
    (('backward', 2), ('evaluation', 0))
    """
    match = _MOMENT.fullmatch(text)
    return (match["phase"], int(match["step"])) if match else (text, 0)


def storage_frames(storage: Storage, mark: Mark | None) -> list[Frame]:
    """Frames that say what a planned storage is: the tensor, its category, and the phase that made it."""
    shape = None if storage.shape is None else str(list(storage.shape))
    tensor = " ".join(text for text in (storage.dtype, shape) if text) or _NO_TENSOR
    frames: list[Frame] = [
        {"filename": tensor, "line": 0, "name": storage.where},
        {"filename": "category", "line": 0, "name": storage.category},
    ]
    if mark is not None:
        frames.append({"filename": "step", "line": mark.step, "name": mark.phase})
    return frames


def planned_storage(frames: Sequence[Mapping[str, Any]], num_bytes: int) -> Storage | None:
    """The storage that `storage_frames` described; None if these frames are no such description."""
    if len(frames) < 2 or frames[1].get("filename") != "category":
        return None
    tensor, where, category = (
        str(frames[0].get("filename")), str(frames[0].get("name")), str(frames[1].get("name")),
    )  # fmt: skip
    match = None if tensor == _NO_TENSOR else _TENSOR.fullmatch(tensor)
    dtype = match["dtype"] if match else None
    shape = match["shape"] if match else None
    sizes = None if shape is None else tuple(int(size) for size in shape.strip("[]").split(",") if size)
    return Storage(num_bytes, category, where, dtype, sizes)


def name_of(frames: Sequence[Mapping[str, Any]]) -> str:
    """
    Where a recorded allocation was made: `function file:line` of the innermost frame outside torch and C++.

    Without such a frame it is torch's innermost Python frame, then the innermost C++ function that is none of the
    allocator's; without frames it is `unknown`.

    >>> name_of([{"name": "forward", "filename": "/lib/site-packages/torch/nn/modules/linear.py", "line": 134},
    ...          {"name": "forward", "filename": "/lib/site-packages/peft/tuners/lora/layer.py", "line": 780}])
    'forward peft/tuners/lora/layer.py:780'
    """
    for frame in frames:
        if not _TORCH.search(_file(frame)):
            return _place(frame)
    for frame in frames:
        if _TORCH_PYTHON.search(_file(frame)):
            return _place(frame)
    for frame in frames:
        if not _ALLOCATOR.search(str(frame.get("name", ""))):
            return str(frame["name"])
    return UNKNOWN


def _file(frame: Mapping[str, Any]) -> str:
    return str(frame.get("filename", ""))


def _place(frame: Mapping[str, Any]) -> str:
    return f"{frame.get('name', '')} {_short(_file(frame))}:{frame.get('line', 0)}"


def _short(path: str) -> str:
    """A path from the package on, or else its last two parts."""
    inside = _PACKAGES.sub("", path)
    return inside if inside != path else "/".join(re.split(r"[/\\]", path)[-2:])
