"""What each fact about the software is worth: the errors with it taken away."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from benchmarks.compare import SHAPE, Row, Run
from memplan.tape.behaviour import Behaviour

FACTS = {
    "shift_logits": "the float32 logits copied without the last position (transformers before 4.49)",
    "float_logits": "16-bit logits dropped when the float32 ones are made (transformers before 4.46)",
    "reentrant": "reentrant checkpointing (transformers before 5)",
    "fsdp1": "what FSDP1 keeps of frozen blocks, and its flat units",
    "recomputes_units": "FSDP1's units gathered again for a checkpoint around them, and none ahead",
    "triton_loss": "a loss kernel that writes the gradient over the logits",
    "triton_norm": "a norm kernel that saves its input only",
    "fused_lora": "fused LoRA over 4-bit layers",
    "liger_before_0_5": "Liger's fused loss in its first form",
    "compute_capability": "which attention kernels the card has",
    "hold_logits": "a script that keeps the model's output",
    "use_cache": "a cache that fills while training",
}
"""Fields of `Behaviour`, in words."""


@dataclass(frozen=True)
class Ablation:
    """The absolute errors of the runs whose peak one fact changes, as they are and without it."""

    fact: str
    runs: int
    median: float
    worst: float
    median_without: float
    worst_without: float


def ablate(rows: Iterable[Row]) -> list[Ablation]:
    """Of allocated peaks, the largest effect first; facts that change no case are left out."""
    allocated = [row for row in rows if row.measured.statistic == "allocated" and row.engine == SHAPE]
    results = [result for field in FACTS if (result := _without(field, allocated)) is not None]
    return sorted(results, key=lambda result: -result.worst_without)


def _without(field: str, rows: list[Row]) -> Ablation | None:
    default = getattr(Behaviour(), field)
    before, after = [], []
    for row in rows:
        if getattr(row.case.behaviour, field) != default:
            behaviour = dataclasses.replace(row.case.behaviour, **{field: default})
            predicted = Run(row.case, behaviour).predict("allocated")
            assert predicted is not None
            if predicted != row.predicted_bytes:
                before.append(abs(row.error))
                after.append(abs(predicted / row.measured.bytes - 1))
    if not before:
        return None
    return Ablation(FACTS[field], len(before), median(before), max(before), median(after), max(after))
