"""
What is on this machine's GPU right now: who holds memory, and waiting until they let go. Nothing is ever
killed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from memplan.errors import JobError, NoLiveGpu
from memplan.gpu.probe import Device, GpuFailure, GpuProcess, GpuReading, Probe
from memplan.gpu.visible import match_uuid, visible_devices
from memplan.units import format_bytes

POLL_SECONDS = 2.0
_UUIDS = ("GPU-", "MIG-")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)?\s*")
_SECONDS = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Machine:
    """Everything outside the job that a preflight looks at, so that tests can make their own."""

    probe: Probe
    environ: Mapping[str, str] = field(default_factory=dict)
    torch_version: str | None = None
    platform: str = "linux"
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class LiveCheck:
    """One reading of a GPU of this machine; `skipped` says why there is none."""

    gpu: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    used_by_others_bytes: int | None = None
    processes: tuple[GpuProcess, ...] = ()
    processes_complete: bool = False
    """Whether `processes` can be taken for all there are; in a container the others may be out of sight."""
    skipped: str | None = None
    waited_seconds: float = 0.0


def this_machine() -> Machine:
    """The machine that we run on."""
    from memplan.gpu.nvml import NvmlProbe
    from memplan.preflight.environment import current_platform, installed_torch_version

    return Machine(NvmlProbe(), os.environ, installed_torch_version(), current_platform())


def is_live(gpu: str | None) -> bool:
    """Whether a job's `gpu` means a card of this machine, or nothing in particular."""
    return gpu is None or gpu.strip().upper().startswith(("LIVE", *_UUIDS))


def look(machine: Machine, which: str = "live") -> LiveCheck:
    """
    Read a GPU once: `live` is the one that torch would call `cuda:0`, `live:1` the next, a uuid any.

    A machine without one is a normal result, not an error.
    """
    try:
        device = _find(machine.probe.read(), which.strip(), machine.environ)
    except NoLiveGpu as error:
        return LiveCheck(skipped=_reason(error.message))
    if device is None:
        return LiveCheck(skipped="CUDA_VISIBLE_DEVICES hides the GPU")
    if isinstance(device, GpuFailure):
        return LiveCheck(gpu=device.name or None, skipped=_reason(device.reason))
    return _check_of(device)


def wait_for(
    fits: Callable[[], bool], seconds: float, machine: Machine, on_wait: Callable[[str], None] | None = None
) -> float:
    """
    Ask `fits` again and again until it says yes or `seconds` are over; returns the seconds waited.

    `on_wait` hears once that the waiting begins.
    """
    begin = machine.clock()
    told = False
    while not fits():
        waited = machine.clock() - begin
        if waited >= seconds:
            return waited
        if on_wait is not None and not told:
            on_wait(f"waiting up to {seconds:g} s for memory that others hold")
            told = True
        machine.sleep(min(POLL_SECONDS, seconds - waited))
    return machine.clock() - begin


def process_words(process: GpuProcess) -> str:
    """
    One process in one phrase.

    >>> process_words(GpuProcess(4211, 2**30, "python"))
    'python (pid 4211) holds 1.00 GiB'
    """
    name = process.name or "a process"
    held = "an unknown amount" if process.used_bytes is None else format_bytes(process.used_bytes)
    return f"{name} (pid {process.pid}) holds {held}"


def parse_seconds(text: str) -> float:
    """
    Seconds of a duration such as `60`, `60s`, `1.5m` or `1h`.

    Raises:
        JobError: it is none.

    >>> parse_seconds("90s"), parse_seconds("1.5m")
    (90.0, 90.0)
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise JobError(f"`--wait` cannot be `{text}`", hint="write a duration such as `60s`, `5m` or `1h`")
    return float(match[1]) * _SECONDS[match[2]]


def _find(devices: Sequence[Device], which: str, environ: Mapping[str, str]) -> Device | None:
    if which.upper().startswith(_UUIDS):
        return match_uuid(devices, which)
    visible, _ = visible_devices(devices, environ)
    position = int(which.partition(":")[2] or 0)
    return visible[position] if position < len(visible) else None


def _reason(sentence: str) -> str:
    if "no NVIDIA driver" in sentence:
        return "no NVIDIA driver"
    return sentence[:1].lower() + sentence[1:]


def _check_of(reading: GpuReading) -> LiveCheck:
    own = os.getpid()
    return LiveCheck(
        gpu=reading.name,
        total_bytes=reading.total_bytes,
        free_bytes=reading.free_bytes,
        used_by_others_bytes=reading.used_by_others_bytes,
        processes=tuple(process for process in reading.processes if process.pid != own),
        processes_complete=reading.processes_complete,
    )
