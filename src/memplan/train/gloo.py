"""
gloo's threads, and when they have let go of what they were given.

A collective is over for the thread that waits for it a moment before gloo's own thread drops its references. What the
waiting thread drops first is then freed on gloo's, where torch's profiler sees no free.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

_THREAD_NAME = "pt_gloo_runloop"
"""c10::setThreadName in ProcessGroupGloo::runLoop."""
_TASKS = Path("/proc/self/task")
_POLL_SECONDS, _MOST_SECONDS = 2e-4, 10.0
"""
A thread that is busy with another collective rests when that is over, and one that waits for a core gets one: the limit
is there so that nothing can hang.
"""


@contextmanager
def settled_collectives() -> Iterator[None]:
    """
    Whoever waits for a collective inside waits until gloo's threads rest, too: FSDP and DDP for a `Work`, DTensor for a
    tensor. Linux only: elsewhere nothing changes.
    """
    if not dist.is_available() or not dist.is_initialized() or not _TASKS.is_dir():
        yield
        return
    from torch.distributed import _functional_collectives

    with _settled(dist.Work, "wait"), _settled(_functional_collectives, "wait_tensor"):
        yield


@contextmanager
def _settled(owner: Any, name: str) -> Iterator[None]:
    original = getattr(owner, name)

    def wait(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        _wait_for_threads()
        return result

    setattr(owner, name, wait)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _wait_for_threads() -> None:
    ends_at = time.monotonic() + _MOST_SECONDS
    while any(_is_running(task) for task in _TASKS.iterdir()) and time.monotonic() < ends_at:
        time.sleep(_POLL_SECONDS)


def _is_running(task: Path) -> bool:
    """Whether a thread is one of gloo's and does not sleep: it runs, wants to, or waits for the kernel (`D`)."""
    try:
        name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
    except OSError:  # it has ended
        return False
    return name == _THREAD_NAME and rest.split()[0] in "RD"
