"""Memory that a process takes on the GPU outside torch's allocator: the CUDA context and its kernels."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from memplan.gpu.catalogue import PROFILE_FOLDER, GpuProfile
from memplan.units import MiB


def context_bytes(gpu: GpuProfile | None) -> tuple[int, str]:
    """
    Bytes of one process's CUDA context with the kernels that training loads, and where the figure comes from.

    A measured context of the same card, else the one of the largest card of its generation (a context grows
    with the number of multiprocessors), plus an allowance for kernels, which load when they are first used.
    For any other card, and for None, the largest figure reported. NCCL is not included. Sources are in
    `profiles/gpus/context.json`.
    """
    facts = _facts()
    measured, basis = _measured(gpu, facts)
    if measured is None:
        where = f"not measured on {gpu.name if gpu else 'this card'}"
        return facts["unmeasured_mib"] * MiB, f"{where}; {facts['unmeasured_source']}"
    kernels = facts["kernels_mib"]
    total = (measured["mib"] + kernels) * MiB
    return total, f"{measured['mib']} MiB {basis} ({measured['source']}) and {kernels} MiB for kernels"


def _measured(gpu: GpuProfile | None, facts: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    if gpu is None:
        return None, ""
    if gpu.name in facts["cards"]:
        return facts["cards"][gpu.name], "measured on this card"
    card = facts["generations"].get(gpu.generation, {}).get("card")
    if card is None:
        return None, ""
    return facts["cards"][card], f"not measured on this card but on the larger {card}"


@cache
def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((PROFILE_FOLDER / "context.json").read_text(encoding="utf-8"))
    return facts
