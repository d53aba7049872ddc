"""Snapshots as torch records them, made from tapes: other frames, no categories, and nothing of memplan's own."""

from __future__ import annotations

import copy
from typing import Any

from memplan.job.spec import AllocatorSettings
from memplan.snapshot import snapshot_of
from memplan.tape.tape import WrittenTape

TORCH = "/venv/lib/python3.11/site-packages/torch"
INNER = [
    {"name": "at::detail::empty_generic(c10::ArrayRef<long>)", "filename": "??", "line": 0},
    {"name": "at::native::mm(at::Tensor const&)", "filename": "aten/src/ATen/native/Blas.cpp", "line": 12},
    {"name": "forward", "filename": f"{TORCH}/nn/modules/linear.py", "line": 134},
    {"name": "_call_impl", "filename": f"{TORCH}/nn/modules/module.py", "line": 1787},
]
"""What lies between an allocation and the model."""
OUTER = [{"name": "main", "filename": "/home/somebody/train.py", "line": 7}]


def frames_of(where: str) -> list[dict[str, Any]]:
    """The stack of an allocation by a function of the model that is called `where`."""
    own = {"name": where, "filename": "/venv/lib/python3.11/site-packages/models/net.py", "line": 41}
    return [*INNER, own, *OUTER]


def recording_of(
    written: WrittenTape,
    settings: AllocatorSettings,
    *,
    drop: int = 0,
    device: int = 0,
    frames: bool = True,
    metadata: bool = False,
) -> dict[str, Any]:
    """
    What `torch.cuda.memory._snapshot()` returns after a run that did what the tape says.

    Args:
        drop: how many of the oldest entries the ring buffer has lost.
        device: where it ran; the traces of the devices before it are empty.
        frames: whether stacks were recorded.
        metadata: whether the run named its phases.
    """
    snapshot = copy.deepcopy(snapshot_of(written, settings))
    del snapshot["memplan"]
    [trace] = snapshot["device_traces"]
    for entry in trace:
        entry.pop("category", None)
        entry["frames"] = frames_of(entry["frames"][0]["name"]) if frames else []
        if not metadata:
            entry["user_metadata"] = ""
    for segment in snapshot["segments"]:
        segment["device"] = device
        for block in segment["blocks"]:
            known = frames and block["frames"]
            block["frames"] = frames_of(block["frames"][0]["name"]) if known else []
    snapshot["device_traces"] = [[] for _ in range(device)] + [trace[drop:]]
    return snapshot
