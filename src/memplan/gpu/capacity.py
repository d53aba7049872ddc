"""How many bytes one process can get: of a card by name or size, or of a GPU of this machine right now."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memplan.errors import GpuError, NoLiveGpu
from memplan.gpu.catalogue import GpuProfile, find_gpu, list_gpus
from memplan.units import MiB, format_bytes, parse_bytes

if TYPE_CHECKING:
    from memplan.gpu.probe import Device, GpuReading, Probe

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", re.IGNORECASE)
_LIKE_A_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:[a-z]{0,2}b[a-z]{0,2}|[kmg]i?|t)", re.IGNORECASE)
"""A number with something like a unit: `25XB`, `24G`."""
_COUNT = re.compile(r"\d+\s*[x×*].*\d", re.IGNORECASE)
"""Of cards, whose names and sizes all have a digit: `2x4090`."""
_LIVE = re.compile(r"live(?::(\d+))?", re.IGNORECASE)
_KNOWN = ("verified", "torch-only")
"""Confidence of the cards that may stand for a size."""
_UUID_PREFIXES = ("GPU-", "MIG-")


@dataclass(frozen=True)
class Capacity:
    """
    A card. `usable_bytes` is what one process can get: total less driver reserve and less what others hold.
    """

    gpu: str
    total_bytes: int
    usable_bytes: int
    used_by_others_bytes: int
    source: str


def resolve_capacity(text: str, probe: Probe | None = None) -> Capacity:
    """
    The capacity that a job or `--gpu` names.

    `24GB` is the smallest card sold under that size, `24GiB` exactly that much, a name or alias a card of
    the catalogue, and `live`, `live:1` or a uuid (`GPU-...`, `MIG-...`) a GPU of this machine as it is now.
    Raises `GpuError` for a size or name that means nothing or several things, `NoLiveGpu` when no live
    reading can be had.
    """
    text = text.strip()
    if _LIVE.fullmatch(text) or text.upper().startswith(_UUID_PREFIXES):
        return live_capacity(text, probe)
    if _COUNT.match(text):
        raise GpuError(
            f"`{text}` is several GPUs", hint="Name one of them; how many there are is set by `parallel`"
        )
    size = _SIZE.fullmatch(text)
    like = _LIKE_A_SIZE.fullmatch(text)
    if size is None and like is not None:
        raise GpuError(
            f"`{text}` is no memory size",
            hint=f"Write `{like[1]}GB` for the smallest card sold under that name, or `{like[1]}GiB` for exactly that",
        )
    if size is None:
        return _of_card(find_gpu(text))
    if "i" in size[2].lower():
        return _exact(text)
    return _smallest_sold_as(text)


def live_capacity(
    which: str = "live", probe: Probe | None = None, environ: Mapping[str, str] = os.environ
) -> Capacity:
    """
    What one process could get now on `live` (the first GPU it would see), `live:N` (its Nth) or a uuid.

    `usable_bytes` is the memory free now and what this process already holds; a minute later it may be less.
    """
    from memplan.gpu.probe import GpuFailure

    if probe is None:
        from memplan.gpu.nvml import NvmlProbe

        probe = NvmlProbe()
    device, caution = _choose(which, probe.read(), environ)
    if isinstance(device, GpuFailure):
        raise NoLiveGpu(device.reason, hint=device.hint)
    return _of_reading(device, caution)


def usable_bytes(gpu: GpuProfile) -> tuple[int, str]:
    """
    What torch can use of a whole card with nothing else on it, and why.

    The lowest total that torch was seen to report on that card; where none was found, NVML's total less 300
    MiB and 0.75 % of it, which covers every card in `profiles/gpus` with both figures and a current driver.
    Raises `GpuError` for cards that share the host's memory.
    """
    if gpu.kind == "unified":
        raise GpuError(
            f"{gpu.name} shares its memory with the host, and only there it is known what is left for a job",
            hint="Use `live` on the machine, or name a size such as `100GiB`",
        )
    if gpu.torch_total_bytes is not None:
        return gpu.torch_total_bytes, "the lowest total that torch was seen to report"
    if gpu.memory_bytes is None:
        raise GpuError(f"The memory of {gpu.name} is not known", hint="Name its size, such as `48GB`")
    reserve = 300 * MiB + gpu.memory_bytes * 3 // 400
    return gpu.memory_bytes - reserve, "that less 300 MiB and 0.75 %, an upper bound of the driver's share"


def _of_card(gpu: GpuProfile) -> Capacity:
    usable, why = usable_bytes(gpu)
    total = gpu.memory_bytes if gpu.memory_bytes is not None else usable
    return Capacity(
        gpu=gpu.name,
        total_bytes=total,
        usable_bytes=usable,
        used_by_others_bytes=0,
        source=f"catalogue: {format_bytes(total)} ({gpu.source.partition(';')[0]}), usable is {why}",
    )


def _smallest_sold_as(text: str) -> Capacity:
    candidates = [gpu for gpu in list_gpus() if gpu.kind != "unified" and gpu.confidence in _KNOWN]
    cards = [gpu for gpu in candidates if parse_bytes(text) in [size * 10**9 for size in gpu.sold_as_gb]]
    if not cards:
        sizes = ", ".join(
            str(size) for size in sorted({size for gpu in candidates for size in gpu.sold_as_gb})
        )
        raise GpuError(
            f"No GPU of the catalogue is sold as {text} (the sizes are {sizes} GB)",
            hint="A size in GiB, such as `24GiB`, means exactly that many bytes; or name the card",
        )
    smallest = min(cards, key=lambda gpu: usable_bytes(gpu)[0])
    largest = max(cards, key=lambda gpu: usable_bytes(gpu)[0])
    usable, why = usable_bytes(smallest)
    total = smallest.memory_bytes if smallest.memory_bytes is not None else usable
    sentences = [
        f"the smallest sold under that size, {smallest.name}: {format_bytes(total)}, usable is {why}"
    ]
    if largest is not smallest:
        most = format_bytes(usable_bytes(largest)[0])
        sentences.append(f"name the card you have: `{largest.name}` has {most} usable")
    return Capacity(text, total, usable, used_by_others_bytes=0, source="; ".join(sentences))


def _exact(text: str) -> Capacity:
    size = parse_bytes(text)
    if not size:
        raise GpuError(f"`{text}` is no memory size", hint="Such as `24GB`, `24GiB` or the name of a GPU")
    return Capacity(text, size, size, 0, f"{format_bytes(size)} as asked, all of it taken to be usable")


def _choose(which: str, devices: tuple[Device, ...], environ: Mapping[str, str]) -> tuple[Device, str]:
    """The device that `which` names, and a caution about the choice."""
    from memplan.gpu.visible import match_uuid, visible_devices

    live = _LIVE.fullmatch(which.strip())
    if live is None:
        device = match_uuid(devices, which.strip())
        if device is None:
            listed = ", ".join(device.uuid for device in devices if device.uuid)
            message = f"No single GPU here has a uuid that begins with {which}"
            raise NoLiveGpu(message, hint=f"There are {listed}" if listed else "Use `live`")
        return device, ""
    visible, caution = visible_devices(devices, environ)
    position = int(live[1] or 0)
    if position >= len(visible):
        setting = environ.get("CUDA_VISIBLE_DEVICES")
        because = f" with CUDA_VISIBLE_DEVICES={setting!r}" if setting is not None else ""
        raise NoLiveGpu(
            f"`{which}` asks for GPU {position}, and a process here sees {len(visible)}{because}",
            hint="Count from 0, or change CUDA_VISIBLE_DEVICES",
        )
    return visible[position], caution


def _of_reading(reading: GpuReading, caution: str) -> Capacity:
    usable = min(reading.total_bytes, reading.free_bytes + reading.own_bytes)
    sentences = [_where(reading), _holders(reading)]
    if caution:
        sentences.append(caution)
    return Capacity(
        gpu=reading.name,
        total_bytes=reading.total_bytes,
        usable_bytes=usable,
        used_by_others_bytes=reading.used_by_others_bytes,
        source="; ".join(sentence for sentence in sentences if sentence),
    )


def _where(reading: GpuReading) -> str:
    free = f"{format_bytes(reading.free_bytes)} of {format_bytes(reading.total_bytes)} free now"
    if reading.unified:
        return f"unified memory, shared with every program of the host: {free} (MemAvailable)"
    driver = f", driver {reading.driver_version}" if reading.driver_version else ""
    return f"NVML, {reading.uuid or f'GPU {reading.index}'}{driver}: {free}"


def _holders(reading: GpuReading) -> str:
    """Who holds the rest, as far as it can be known; never that nobody else is there."""
    if reading.unified or reading.used_by_others_bytes == 0:
        return ""
    held = f"{format_bytes(reading.used_by_others_bytes)} held by others"
    if reading.reserved_bytes is None:
        held += " and the driver, which is too old to tell them apart"
    named = [
        f"{process.name or 'process'} {process.pid}"
        + (f" ({format_bytes(process.used_bytes)})" if process.used_bytes is not None else "")
        for process in reading.processes
        if not (reading.own_bytes and process.pid == os.getpid())
    ]
    display = ["a display"] if reading.display_active else []
    if not named and not display:
        return held if reading.processes_complete else f"{held}, whose processes cannot be seen from here"
    return f"{held}: {', '.join(named + display)}"
