"""Which GPUs a CUDA process would see, in its order: `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from memplan.gpu.probe import Device

_LEADING_INTEGER = re.compile(r"\s*([+-]?\d+)")


def visible_devices(devices: Sequence[Device], environ: Mapping[str, str]) -> tuple[list[Device], str]:
    """
    The devices in the order of `cuda:0`, `cuda:1`, ..., and a caution about that order ("" if there is none).

    Reads the variables as torch does (`torch/cuda/__init__.py`, `_parse_visible_devices`): uuids or their
    prefixes, or indices of which the first invalid or negative one ends the list, and a repeated one
    empties it. Indices count GPUs in CUDA's order, which is fastest first unless
    `CUDA_DEVICE_ORDER=PCI_BUS_ID`; of a GPU in MIG mode a process sees the first MIG device.
    """
    ordered = _by_bus_id(devices)
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and chosen.startswith(("GPU-", "MIG-")):
        return _by_uuid(ordered, chosen.split(",")), ""
    gpus: dict[int, Device] = {}
    for device in ordered:
        gpus.setdefault(device.index, device)
    selected = list(gpus.values())
    if chosen is not None:
        selected = _by_index(selected, chosen.split(","))
    return selected, _caution(ordered, environ) if selected else ""


def match_uuid(devices: Sequence[Device], prefix: str) -> Device | None:
    """The one device whose uuid begins so; None if there is none or several."""
    matches = [device for device in devices if prefix and device.uuid.lower().startswith(prefix.lower())]
    return matches[0] if len(matches) == 1 else None


def _by_bus_id(devices: Sequence[Device]) -> list[Device]:
    """In NVML's order, which is that of the bus ids, where a GPU that cannot be read has told none."""
    all_told = all(device.pci_bus_id for device in devices)
    return sorted(
        devices,
        key=lambda device: (device.pci_bus_id if all_told else "", device.index, device.mig_index or 0),
    )


def _by_uuid(devices: Sequence[Device], entries: Sequence[str]) -> list[Device]:
    selected: list[Device] = []
    for entry in entries:
        device = match_uuid(devices, entry.strip())
        if device is None:
            break
        if device in selected:
            return []
        selected.append(device)
    return selected


def _by_index(gpus: Sequence[Device], entries: Sequence[str]) -> list[Device]:
    selected: list[int] = []
    for entry in entries:
        number = _LEADING_INTEGER.match(entry)
        if number is None or not 0 <= int(number[1]) < len(gpus):
            break
        if int(number[1]) in selected:
            return []
        selected.append(int(number[1]))
    return [gpus[index] for index in selected]


def _caution(devices: Sequence[Device], environ: Mapping[str, str]) -> str:
    if any(device.mig_index for device in devices):
        return "a process sees one MIG device: choose it with CUDA_VISIBLE_DEVICES=MIG-<uuid>"
    if len({device.name for device in devices}) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return (
            "the GPUs differ, so CUDA's numbering (fastest first) may not be the driver's: "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID or name the GPU by its uuid"
        )
    return ""
