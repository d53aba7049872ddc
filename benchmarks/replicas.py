"""What the accuracy page says of the complete jobs that are planned too low."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.compare import Row, Run
from memplan.units import MiB

REPLICAS = ("fsdpqlora-3090-7b-qlora-ddp-bs8-2048", "fsdpqlora-3090-7b-lora-ddp-bs4-2048")
"""Complete jobs of high trust that are planned too low."""


def too_low_note(rows: Sequence[Row]) -> str:
    """The complete jobs that are planned too low: replicas that FSDP1 keeps in step."""
    qlora, lora = (
        next((row for row in rows if row.case.id == name and row.measured.statistic == "reserved"), None)
        for name in REPLICAS
    )
    if qlora is None or lora is None:
        return ""
    in_place = [
        replace(row, predicted_bytes=predicted)
        for row in (qlora, lora)
        if (predicted := Run(row.case, replace(row.case.behaviour, adds_in_place=True)).predict("reserved"))
    ]
    return (
        "Two reserved peaks are planned too low, both of replicas that FSDP1 keeps in step (NO_SHARD): "
        f"{' and '.join(f'`{row.case.id}`, {row.error:+.2%} ({_beside(row)})' for row in (qlora, lora))}. "
        "Read in fsdp_qlora and in torch 2.2, and excluded: gradients that are reduced in another dtype or cast for it "
        "(no MixedPrecision is given), clipping (off), an optimizer other than foreach AdamW with states in bfloat16. "
        "Planned already: gradients of the matrices wait for the stream that concatenates them. The second row depends "
        "on peft, of which the source names no version: until 0.8.2 it adds an adapter's output in place. So planned "
        f"the rows are off by {' and '.join(f'{row.error:+.2%}' for row in in_place)}: what the first one lacks "
        "was not found.\n\n"
    )


def _beside(row: Row) -> str:
    return f"{(row.predicted_bytes - row.measured.bytes) / MiB:+.0f} MiB"
