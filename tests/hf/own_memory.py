"""Which tensors are in memory of this process alone, and which are parts of a file that is mapped."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

MAPS = Path("/proc/self/maps")
"""Only Linux says it."""


def own_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of tensors on the CPU that are of no checkpoint's file; each storage once."""
    mapped = []
    for line in MAPS.read_text().splitlines():
        begin, _, end = line.split(maxsplit=1)[0].partition("-")
        if line.endswith((".safetensors", ".bin")):
            mapped.append(range(int(begin, 16), int(end, 16)))
    storages = {}
    for tensor in tensors:
        if tensor.device.type == "cpu":
            address = tensor.untyped_storage().data_ptr()
            if not any(tensor.data_ptr() in part for part in mapped):
                storages[address] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
