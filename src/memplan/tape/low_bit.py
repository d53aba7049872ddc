"""
torchao's AdamW with states of 8 or 4 bits, or of 8-bit floats: what its states take, and what its compiled step does.

States are quantised in blocks of 256, as transformers asks for (trainer_optimizer.py, _get_torchao_optimizer); tensors
of fewer than 4096 numbers, or of no whole number of blocks, keep states of their own dtype (torchao 0.17,
optim/adam.py, _new_buffer). The step of each parameter is compiled by itself. Buffers of its graph between kernels are
those that inductor of torch 2.13 writes for CUDA (`python -m benchmarks.torchao_step`): none where rows are blocks,
else two float32 copies of the parameter in 8 bits, and with them two of int64 in 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from memplan.tape.multiprocessors import Multiprocessors

BLOCK = 256
SMALLEST = 4096
_CODES = {"ao_adamw_8bit": "uint8", "ao_adamw_4bit": "uint8", "ao_adamw_fp8": "float8_e4m3fn"}
_MAPS = {"ao_adamw_8bit": 256, "ao_adamw_4bit": 16}
"""Values that codes stand for; 8-bit floats stand for themselves."""
LOW_BIT = tuple(_CODES)
_OUTPUTS_PER_MULTIPROCESSOR = 64
"""Reductions with fewer outputs are split in two (torch/_inductor/ir.py, num_splits)."""


class Buffer(NamedTuple):
    """A tensor by its name, its shape and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def is_quantized(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape, on one rank, has quantised states."""
    count = prod(shape)
    return count >= SMALLEST and count % BLOCK == 0


def state_buffers(optimizer: str, shape: tuple[int, ...], dtype: str) -> Iterator[Buffer]:
    """What the states of a parameter are made of, in the order in which they are made."""
    count = prod(shape)
    for state in ("exp_avg", "exp_avg_sq"):
        if not is_quantized(shape):
            yield Buffer(state, shape, dtype)
            continue
        packed = (count // 2,) if optimizer == "ao_adamw_4bit" else shape
        yield Buffer(f"{state} codes", packed, _CODES[optimizer])
        yield Buffer(f"{state} scale", (count // BLOCK,), "float32")
        if optimizer in _MAPS:
            yield Buffer(f"{state} qmap", (_MAPS[optimizer],), "float32")


def step_buffers(optimizer: str, shape: tuple[int, ...], device: Multiprocessors) -> list[Buffer | str]:
    """
    What the compiled step of a parameter allocates (a `Buffer`) and frees (its name), in order.

    Args:
        shape: of the parameter on one rank.
        device: the GPU's multiprocessors, by which inductor splits reductions.
    """
    if not is_quantized(shape):
        return []
    by_optimizer = {"ao_adamw_8bit": _eight_bits, "ao_adamw_4bit": _four_bits, "ao_adamw_fp8": _floats}
    written = by_optimizer[optimizer](shape, device)
    kinds = {
        "S": ("scale", (prod(shape) // BLOCK,), "float32"),
        "P": ("partial maximum", (prod(shape) * 2 // BLOCK,), "float32"),
        "F": ("state over its scale", (prod(shape) // BLOCK, BLOCK), "float32"),
        "I": ("position in the map", (prod(shape),), "int64"),
        "C": ("codes", shape, "float8_e4m3fn"),
    }
    states = ("exp_avg", "exp_avg_sq")
    buffers = {
        f"{letter}{index}": Buffer(f"{name} of {state}", extents, dtype)
        for letter, (name, extents, dtype) in kinds.items()
        for index, state in enumerate(states)
    }
    return [buffers[word[1:]] if word[0] == "+" else buffers[word[1:]].name for word in written.split()]


def _eight_bits(shape: tuple[int, ...], _: Multiprocessors) -> str:
    last = shape[-1]
    if len(shape) == 1 or last == BLOCK:
        return ""
    made = "+S0 +S1 +F0 +F1"
    return f"{made} -S0 -S1 -F0 -F1" if BLOCK % last == 0 else f"{made} -F0 -F1 -S0 -S1"


def _floats(shape: tuple[int, ...], _: Multiprocessors) -> str:
    last = shape[-1]
    if len(shape) == 2 and last == BLOCK:
        return ""
    if len(shape) > 1 and last < BLOCK and BLOCK % last == 0:
        return "+S0 +S1 +C0 +C1 -C0 -S0 -C1 -S1"
    return "+S0 +S1 -S0 -S1"


def _four_bits(shape: tuple[int, ...], device: Multiprocessors) -> str:
    splits = prod(shape) // BLOCK < _OUTPUTS_PER_MULTIPROCESSOR * device.number
    made = "+S0 +S1 +F0 +F1 +I0 +I1"
    if splits:
        made = "+P0 +P1 +S0 -P0 +S1 -P1 +F0 +F1 +I0 +I1"
    elif shape[-1] % BLOCK and BLOCK % shape[-1]:
        return f"{made} -S0 -S1 -F0 -I0 -F1 -I1"
    return f"{made} -F0 -I0 -S0 -F1 -I1 -S1"
