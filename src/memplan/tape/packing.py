"""How bitsandbytes packs a weight into 4 bits, on the device (bitsandbytes/functional.py, quantize_4bit)."""

from __future__ import annotations

from memplan.tape.graph import Graph
from memplan.tape.tensors import Tensor

DYNAMIC_MAP_BYTES = 256 * 4
"""The 256 values of 8-bit constants, in float32: one table of the process, of which every state keeps a copy."""


def pack(
    g: Graph, name: str, num_elements: int, *, double_quant: bool, local_bytes: int | None
) -> list[Tensor]:
    """
    What stays of a weight of so many elements: its packed form, and the constants of blocks of 64, with
    `double_quant` in 8 bits, with constants of blocks of 256 of those.

    Args:
        local_bytes: of the packed weight on this rank; None where that is not on the device.
    """
    blocks = -(-num_elements // 64)
    kept: list[Tensor] = []

    def keep(num_bytes: int, part: str) -> None:
        kept.append(g.new((num_bytes,), "uint8", f"{name} {part}", "quant_state"))

    constants = g.new((blocks,), "float32", f"{name} absmax", "quant_state")
    if local_bytes is not None:
        kept.append(g.new((local_bytes,), "uint8", f"{name} packed weight", "weights"))
    keep(16 * 4, "code")
    g.scratch(16 * 4, 4, name=f"{name} largest value of the code")
    if not double_quant:
        return [*kept, constants]
    keep(4, "offset")
    difference = g.new((blocks,), "float32", f"{name} absmax less offset", "workspace")
    keep(-(-blocks // 256) * 4, "absmax of absmax")
    keep(blocks, "absmax in 8 bits")
    keep(DYNAMIC_MAP_BYTES, "code of absmax")
    del difference, constants
    return kept


def cpu_packing_scratch(num_elements: int, dtype: str, quantization_type: str) -> list[int]:
    """
    Bytes of what is alive at once, beside the weight, while bitsandbytes packs it on the CPU: there quantize_4bit is
    written in torch operations (bitsandbytes/backends/default/ops.py). On CUDA it is one kernel.
    """
    n = num_elements
    constants, scaled, index = -(-n // 64) * 4, n * 4, n * 4
    float_copy = 0 if dtype == "float32" else n * 4
    if quantization_type == "fp4":
        # Its codes are not in order: indices are looked up, as int64, in a table.
        return [constants, float_copy, scaled, index, n * 8, n * 8]
    return [constants, float_copy, scaled, index, n, -(-n // 2), -(-n // 2)]
