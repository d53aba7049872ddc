"""From rows to the error bands that estimates carry: `src/memplan/profiles/accuracy.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import ceil, floor
from pathlib import Path
from typing import Any

from benchmarks.compare import ASSUMED, ONE_GPU, SHARDED, NeedRow, Row

FILE = Path(__file__).parent.parent / "src" / "memplan" / "profiles" / "accuracy.json"
MIN_RUNS = 5
"""A method with fewer has no band of its own."""
REPORT = "docs/accuracy.md"


def error_bands(rows: Sequence[Row], needs: Sequence[NeedRow]) -> dict[str, Any]:
    """
    Smallest and largest measured / predicted - 1, by method on one GPU, over all of these, and for several GPUs.

    Torch's own statistics count, allocated and reserved, and how far needs lie outside of what the runs show; not
    what nvidia-smi shows, which holds a cache that no need includes, and not runs of other model code or sources
    of low trust.
    """
    counted = [
        row
        for row in rows
        if row.measured.statistic in ("allocated", "reserved") and row.case.trust in ("high", "medium")
    ]
    one_gpu: list[Row | NeedRow] = [row for row in counted if row.group in (ONE_GPU, ASSUMED)]
    one_gpu += needs
    bands = {"all": _band(one_gpu, "published runs on one GPU")}
    for method, name in (("full", "full"), ("lora", "LoRA"), ("qlora", "QLoRA")):
        chosen = [row for row in one_gpu if row.case.method == method]
        if len({row.case.id for row in chosen}) >= MIN_RUNS:
            bands[method] = _band(chosen, f"published {name} runs on one GPU")
    sharded = [row for row in counted if row.group == SHARDED]
    if len({row.case.id for row in sharded}) >= MIN_RUNS:
        bands["sharded"] = _band(sharded, "published runs on 2 and 4 GPUs")
    return bands


def _band(rows: Sequence[Row | NeedRow], what: str) -> dict[str, Any]:
    """Rounded outwards to a hundredth of a percent, and never without zero."""
    errors = [1 / (1 + row.error) - 1 for row in rows]
    runs = len({row.case.id for row in rows})
    return {
        "low": floor(min(0.0, *errors) * 10_000) / 10_000,
        "high": ceil(max(0.0, *errors) * 10_000) / 10_000,
        "source": f"smallest and largest error on {runs} {what}, {REPORT}",
    }


def dump_bands(bands: dict[str, Any]) -> str:
    """As the file holds them: one band per line."""
    lines = (f"  {json.dumps(key)}: {json.dumps(band)}" for key, band in bands.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"
