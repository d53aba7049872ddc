"""
Safetensors files whose embeddings get more rows or other ones, or a head beside them, without reading what stays.

The format is 8 bytes with the length of the header, the header in JSON, the data (the format's own description,
https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from memplan.train.skeleton import add_mean_rows

_METADATA = "__metadata__"


def copy_grown(
    source: Path, destination: Path, rows: Mapping[str, int], added: Mapping[str, str] | None = None
) -> None:
    """
    Copy a file, with more rows in some of its tensors: `add_mean_rows`. No more than those are in RAM.

    Args:
        rows: by tensor, how many it is to have.
        added: names of tensors to put behind the others, by them those that they are copies of.
    """
    added = added or {}
    if not rows and not added:
        shutil.copyfile(source, destination)
        return
    names = {*rows, *added.values()}
    grown = {
        name: add_mean_rows(tensor, rows[name]) if name in rows else tensor
        for name, tensor in _read(source, names)
    }
    header, data = read_header(source)
    ordered = sorted(
        (item for item in header.items() if item[0] != _METADATA), key=lambda item: item[1]["data_offsets"]
    )
    changed: dict[str, Any] = {_METADATA: header[_METADATA]} if _METADATA in header else {}
    end = 0
    for name, entry in ordered:
        first, last = entry["data_offsets"]
        shape, num_bytes = entry["shape"], last - first
        if name in grown:
            shape, num_bytes = list(grown[name].shape), grown[name].nbytes
        changed[name] = {**entry, "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    for name, twin in added.items():
        num_bytes = grown[twin].nbytes
        changed[name] = {**changed[twin], "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    encoded = json.dumps(changed, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with source.open("rb") as old, destination.open("wb") as new:
        new.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, entry in ordered:
            first, last = entry["data_offsets"]
            if name in grown:
                new.write(as_bytes(grown[name]))
            else:
                old.seek(data + first)
                _copy(old, new, last - first)
        for twin in added.values():
            new.write(as_bytes(grown[twin]))


def write_rows(file: Path, name: str, ids: Sequence[int], rows: Tensor) -> None:
    """Write rows (K, d) over those of the given numbers in a tensor (V, d) of a file, in its dtype."""
    (held,) = (tensor.dtype for _, tensor in _read(file, [name]))
    offset = tensor_offsets(file)[name]
    converted = rows.to(held).contiguous()
    with file.open("r+b") as opened:
        for number, row in zip(ids, converted):
            opened.seek(offset + number * row.nbytes)
            opened.write(as_bytes(row))


def write_whole(file: Path, name: str, tensor: Tensor) -> None:
    """Write a tensor over that of the same shape in a file, in its dtype."""
    write_rows(file, name, [0], tensor.unsqueeze(0))


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length)), 8 + length


def tensor_offsets(file: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file begins."""
    header, data = read_header(file)
    return {name: data + entry["data_offsets"][0] for name, entry in header.items() if name != _METADATA}


def as_bytes(tensor: Tensor) -> memoryview:
    """What a tensor on the CPU holds."""
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())


def _read(file: Path, names: Any) -> list[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return [(name, tensors.get_tensor(name)) for name in names]


def _copy(old: BinaryIO, new: BinaryIO, num_bytes: int) -> None:
    while num_bytes:
        block = old.read(min(num_bytes, 1 << 20))
        if not block:
            raise OSError("the file ends early")
        new.write(block)
        num_bytes -= len(block)
