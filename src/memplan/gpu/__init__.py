"""Capacity: the GPU catalogue, live readings of this machine, and the size of a CUDA context."""

from memplan.gpu.capacity import live_capacity, resolve_capacity, usable_bytes
from memplan.gpu.catalogue import GpuProfile, find_gpu, list_gpus, match_gpu
from memplan.gpu.context import context_bytes
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
