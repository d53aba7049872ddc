"""
What the ready jobs need, beside the figures that are claimed for them. `python -m benchmarks.known_jobs`

The claims: naive NPT on Llama-3.1-8B (4 x 512 tokens, intermediate size 14336, float32) builds a weight delta of
4 * 512 * 4096 * 14336 * 4 bytes, which is 448 GiB; its optimised form runs in under 40 GB, and GPT-2 in 2 GB; LoRA of
rank 128 on Qwen2.5-7B was counted at 25.0 GB for 2 x 2048 tokens and at 20.0 GB for 1 x 1536.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.budget.estimate import estimate
from memplan.budget.result import Result
from memplan.fit import smallest_changes
from memplan.gpu import resolve_capacity
from memplan.job.load import load_job
from memplan.job.ready import list_jobs
from memplan.model import resolve_model
from memplan.preflight.verdict import judge
from memplan.units import GiB, format_bytes

GB = 10**9


@dataclass(frozen=True)
class Claim:
    """A figure that goes round about a job: the largest tensor, or the memory it needs."""

    job: str
    of: str
    bytes: int


CLAIMS = (
    Claim("npt-llama-8b-naive", "largest tensor", 448 * GiB),
    Claim("npt-llama-8b", "need", 40 * GB),
    Claim("npt-gpt2", "need", 2 * GB),
    Claim("qwen2.5-7b-lora-24gb-before", "need", 25 * GB),
    Claim("qwen2.5-7b-lora-24gb-after", "need", 20 * GB),
)


def plan(name: str) -> Result:
    """The estimate of a ready job."""
    job = load_job(name).job
    return estimate(job, resolve_model(job.model))


def main() -> None:
    """Print needs of all ready jobs, the claims as ratios, and what makes the 24 GB job fit."""
    print(f"{'job':30}{'need':>14}{'allocated':>14}{'largest tensor':>16}")
    results = {name: plan(name) for name, _ in list_jobs()}
    for name, result in results.items():
        figures = (result.need_bytes, result.peak.allocated_bytes, result.top[0].bytes)
        print(
            f"{name:30}{format_bytes(figures[0]):>14}{format_bytes(figures[1]):>14}{format_bytes(figures[2]):>16}"
        )

    print(f"\n{'claim':46}{'claimed':>14}{'planned':>14}{'ratio':>8}")
    for claim in CLAIMS:
        result = results[claim.job]
        planned = result.need_bytes if claim.of == "need" else result.top[0].bytes
        words = f"{claim.job}: {claim.of}"
        print(
            f"{words:46}{format_bytes(claim.bytes):>14}{format_bytes(planned):>14}{planned / claim.bytes:8.3f}"
        )

    capacity = resolve_capacity("RTX 4090")
    print(f"\non {capacity.gpu}, {format_bytes(capacity.usable_bytes)} usable")
    for name in ("qwen2.5-7b-lora-24gb-before", "qwen2.5-7b-lora-24gb-after"):
        print(f"  {name}: {judge(results[name], capacity).state}")
    for name, gpu in (("qwen2.5-7b-lora-24gb-before", "RTX 4090"), ("npt-llama-8b-naive", "80GB")):
        job = load_job(name).job
        (change, *_) = smallest_changes(job, resolve_model(job.model), resolve_capacity(gpu), num_results=1)
        print(
            f"  {name} on {gpu}: {change.summary} (tier {change.tier}), needs {format_bytes(change.need_bytes)}"
        )


if __name__ == "__main__":
    main()
