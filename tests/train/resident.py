"""How far the resident set of this process grows while something is built, where the system tells. Linux only."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memplan.train.measure import resident_bytes

CAN_TELL = os.access("/proc/self/clear_refs", os.W_OK)
"""Some containers have no high-water mark that can begin anew."""


def peak_growth(build: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that the resident set of this process grew by at its highest, and what was built."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back at once, so that the rest is alive
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = resident_bytes()
    built = build()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 - before, built  # type: ignore[index]
