"""
The recorder for the torch at hand, with the reference counts of a gradient that only autograd's engine holds, as a
handler sees them.

They depend on how many references torch's own Python glue holds at that point, so they are measured once per process on
a graph in which the answer is known.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from memplan.errors import TraceError
from memplan.tape.behaviour import Behaviour
from memplan.tracing.cuda import handlers
from memplan.tracing.recorder import Recorder, called_by_engine


def recorder_for(behaviour: Behaviour, device: str) -> Recorder:
    """
    What records a run on `device`, `cuda` or `cpu`.

    Raises:
        TraceError: the torch at hand cannot be traced.
    """
    on_gpu = device == "cuda"
    return Recorder(
        handlers=handlers(*sole_owner_counts()),
        workspace_bytes=behaviour.cublas_workspace_bytes if on_gpu else 0,
        bias_workspace_bytes=behaviour.cublaslt_workspace_bytes if on_gpu else 0,
        kernel_scratch=on_gpu,
        multiprocessors=behaviour.multiprocessors,
    )


@cache
def sole_owner_counts() -> tuple[int, int]:
    """
    (tensor, storage) reference counts of a gradient that nobody else holds.

    Raises:
        TraceError: the engine did not add gradients where it must.
    """
    seen: list[tuple[int, int]] = []

    def accumulate(_: Recorder, __: Any, args: tuple[Any, ...], ___: dict[str, Any]) -> Any:
        if called_by_engine():
            for index in (0, 1):
                tensor = args[index]
                storage_count = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
                seen.append((tensor._use_count(), storage_count))
        return NotImplemented

    recorder = Recorder(handlers={"aten::add": accumulate})
    with recorder.active():
        leaf = torch.empty(4, device="meta", requires_grad=True)
        middle = leaf.exp()
        # Two branches whose gradients are fresh tensors: only the engine holds them.
        (middle.sin() + middle.cos()).sum().backward()
    if len(seen) != 2:
        raise TraceError(
            f"torch {torch.__version__} cannot be traced: its autograd engine is unlike that of torch 2.11 to 2.13",
            hint="use `--engine shape`",
        )
    return max(seen)
