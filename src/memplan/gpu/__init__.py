"""
Capacity: the GPU catalogue, live readings of this machine, and the size of a CUDA context.

What reads live GPUs is imported with the first use of a name below: an estimate reads none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.exports import lazy_exports
from memplan.gpu.capacity import live_capacity, resolve_capacity, usable_bytes
from memplan.gpu.catalogue import GpuProfile, find_gpu, list_gpus, match_gpu
from memplan.gpu.context import context_bytes

if TYPE_CHECKING:
    from memplan.gpu.probe import Device, GpuFailure, GpuProcess, GpuReading, Probe
    from memplan.gpu.visible import visible_devices

__all__ = [
    "Device",
    "GpuFailure",
    "GpuProcess",
    "GpuProfile",
    "GpuReading",
    "Probe",
    "context_bytes",
    "find_gpu",
    "list_gpus",
    "live_capacity",
    "match_gpu",
    "resolve_capacity",
    "usable_bytes",
    "visible_devices",
]

__getattr__ = lazy_exports(
    __name__,
    {"probe": ("Device", "GpuFailure", "GpuProcess", "GpuReading", "Probe"), "visible": ("visible_devices",)},
)
