"""Results made by hand, with round numbers that a test can name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memplan.budget.result import (
    Capacity,
    Change,
    ErrorBand,
    Host,
    Line,
    ParameterCount,
    Peak,
    PhaseLine,
    Result,
    TensorLine,
)
from memplan.job.spec import Job
from memplan.units import GiB, MiB


def lines(**num_bytes: float) -> tuple[Line, ...]:
    """A budget from GiB by category."""
    return tuple(Line(category, int(size * GiB)) for category, size in num_bytes.items())


def phase(name: str, step: int, reserved: float, **num_bytes: float) -> PhaseLine:
    """One phase whose budget adds up to its peak."""
    budget = lines(**num_bytes)
    return PhaseLine(name, step, sum(line.bytes for line in budget), int(reserved * GiB), budget)


def points() -> tuple[tuple[str, int, int], ...]:
    """A timeline of loading and two steps."""
    made: list[tuple[str, int, int]] = [("load", 0, index * GiB // 2) for index in range(1, 29)]
    for step in (1, 2):
        made += [("forward", step, 14 * GiB + index * GiB // 4) for index in range(24)]
        made += [
            ("backward", step, (22 if index == 2 else 20) * GiB - index * GiB // 8) for index in range(32)
        ]
        made += [("optimizer_step", step, 14 * GiB + GiB // 2 * step)] * 6
    return tuple(made)


def make_result(**changes: Any) -> Result:
    """Needs 23.00 GiB, between 22.50 and 23.50; the peak is in backward of step 2."""
    result = Result(
        job=Job(model="llama-2-7b", micro_batch_size=2, max_seq_len=4096),
        origins={"model": "user"},
        engine={"name": "shape"},
        need_bytes=23 * GiB,
        peak=Peak(
            allocated_bytes=22 * GiB,
            reserved_bytes=23 * GiB + 512 * MiB,
            non_torch_bytes=512 * MiB,
            device_bytes=24 * GiB,
            phase="backward",
            step=2,
            where="lm_head: gradient of the logits",
        ),
        error_band=ErrorBand(22 * GiB + 512 * MiB, 23 * GiB + 512 * MiB, "recorded accuracy"),
        budget=lines(weights=12.5, adapters=0.5, gradients=0.5, optimizer=1, activations=5.5, logits_loss=2),
        phases=(
            phase("load", 0, 12.75, weights=12.5),
            phase("forward", 1, 18, weights=12.5, adapters=0.5, activations=4.5),
            phase("forward", 2, 20, weights=12.5, adapters=0.5, optimizer=1, activations=5.5),
            phase(
                "backward", 2, 23.5,
                weights=12.5, adapters=0.5, gradients=0.5, optimizer=1, activations=5.5, logits_loss=2,
            ),
            phase(
                "optimizer_step", 2, 23.5,
                weights=12.5, adapters=0.5, gradients=0.5, optimizer=1, workspace=0.001,
            ),
        ),
        top=(
            TensorLine("lm_head: logits", (2, 4096, 32000), "float32", 1000 * MiB, "logits_loss"),
            TensorLine("model.embed_tokens.weight", (32000, 4096), "bfloat16", 250 * MiB, "weights"),
            TensorLine("cuBLAS workspace", None, None, 8 * MiB, "workspace"),
        ),
        host=Host(14 * GiB, lines(weights=13, inputs=1)),
        parameters=ParameterCount(6_738_415_616, 39_976_960, 6_738_415_616),
        timeline=points(),
    )  # fmt: skip
    return replace(result, **changes)


def make_capacity(usable_gib: float = 24, *, others_gib: float = 0, gpu: str = "24GB") -> Capacity:
    """A card of which `usable_gib` are usable."""
    usable, others = int(usable_gib * GiB), int(others_gib * GiB)
    return Capacity(gpu, usable + others + 256 * MiB, usable, others, "made by hand")


def make_change(**changes: Any) -> Change:
    """Full checkpointing: 18 GiB, 6 to spare, a third slower."""
    change = Change(
        set={"activation_checkpointing": "full"},
        summary="recompute every block in backward",
        tier=1,
        slowdown=1.33,
        need_bytes=18 * GiB,
        headroom_bytes=6 * GiB,
    )
    return replace(change, **changes)
