"""
Published runs of torchtitan, traced: Llama under FSDP2 on 8 to 128 GPUs. `python -m benchmarks.titan`

Traces the model and the loop of the commits that ran (`benchmarks.titan_model`, `benchmarks.titan_step`) with the
installed torch, and writes `data/titan_traced.json`, with its version. What the sources say, and where:

    5940ddeb5   parallelize_llama.py, train.py, train_configs/llama3_8b.toml; run_llama_train.sh sets
                expandable_segments
    9dec370     the same; a table of runs on 8 and on 128 GPUs
    3b39d7ab0   fused AdamW; a norm of its own before that commit, nn.RMSNorm from it on
    c31ff8b05   the same as after it, and so is db52d57ca, on A100s
    d48445865   units for the embeddings and for the last norm with the head
    d9bdfbb20   the same, with attention that prefers cuDNN (models/attention.py), which selective checkpointing does
                not keep; a table of runs on 8 and on 64 GPUs
    40f8fd007   the model returns float32 logits, which the loop holds; a rotary table of twice the length; no
                expandable_segments yet; torch of June 2024; foreach, and with fused AdamW the same figure
    83c879f18   the same with Llama 2 7B, batch and sequence folded, and a table of 65536 positions; torch of March 2024

run_train.sh, which starts one machine, sets expandable segments from 5940ddeb5 on. For the table of d9bdfbb20 it asks
for them in PYTORCH_ALLOC_CONF, which torch 2.9 does not read (pytorch/pytorch#183387), nor what was built between the
reverts of 27 August 2025 (#161628) and the middle of October (#165281 was merged on the 16th): its run on 8 GPUs, of 16
October by the name of its trace, had none. How the runs on many machines and the table of 9dec370 were started is not
published. multinode_trainer.slurm, which sets nothing, is assumed.

Flash attention ran where nothing else is said: torch 2.3 to 2.7 on these cards (memplan.tape.backends).
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from benchmarks.titan_model import Titan
from memplan.allocator import replay
from memplan.job.spec import AllocatorSettings

FILE = Path(__file__).parent / "data" / "titan_traced.json"
STEPS = 3
FIRST = "reserved in step 1"

_BASE = Titan(world_size=8, micro_batch=1, length=8192, vocab=128256, kv_heads=8, hidden=14336)
_TABLE = replace(_BASE, expandable_segments=False)
_TWO = replace(_TABLE, micro_batch=2)
_FUSED = replace(_BASE, optimizer_kernel="fused")
_NORM = replace(_FUSED, fused_norm=True)
_UNITS = replace(_NORM, more_units=True)
_CUDNN = replace(_UNITS, kernel="CUDNN_ATTENTION", expandable_segments=False)
_EARLY = replace(_TABLE, float_output=True, holds_output=True, reduces_apart=True)
_LLAMA_2 = replace(
    _EARLY, micro_batch=8, length=2048, vocab=32000, kv_heads=32, hidden=11008, folds=True, table_rows=65536
)

RUNS = {
    "titan-8b-5940ddeb5-default": _BASE,
    "titan-8b-5940ddeb5-always": replace(_BASE, reshard="always"),
    "titan-8b-5940ddeb5-never": replace(_BASE, reshard="never"),
    "titan-8b-fsdp8-bs2-eager": _TWO,
    "titan-8b-fsdp128-bs2-eager": replace(_TWO, world_size=128),
    "titan-8b-3b39d7ab0-own-norm": _FUSED,
    "titan-8b-3b39d7ab0-torch-norm": _NORM,
    "titan-8b-c31ff8b05": _NORM,
    "titan-8b-db52d57ca": replace(_NORM, gpu="NVIDIA A100-SXM4-80GB"),
    "titan-8b-d48445865": _UNITS,
    "titan-8b-d9bdfbb20-fsdp2": _CUDNN,
    "titan-8b-d9bdfbb20-fsdp2-64": replace(_CUDNN, world_size=64),
    "titan-8b-40f8fd007": replace(_EARLY, table_rows=16384, gpu="NVIDIA A100-SXM4-80GB"),
    "titan-7b-83c-fsdp2-sac": _LLAMA_2,
    "titan-7b-83c-fsdp2-fullac": replace(_LLAMA_2, checkpointing="full"),
}
"""By case of `data/published.json`."""


def trace_titan(run: Titan) -> dict[str, int]:
    """Peaks of STEPS steps on rank 0, in bytes by statistic."""
    from contextlib import nullcontext

    import torch

    import memplan
    from benchmarks.titan_step import Step, build, reduced_apart

    allocator = AllocatorSettings(expandable_segments=run.expandable_segments)
    with warnings.catch_warnings(), memplan.fake_process_group(run.world_size):
        warnings.simplefilter("ignore")
        model, optimizer = build(run)
        ids = torch.zeros(run.micro_batch, run.length, dtype=torch.int64, device="meta")
        with reduced_apart() if run.reduces_apart else nullcontext():
            traced = memplan.trace(
                Step(run, model, optimizer),
                model,
                optimizer,
                (ids, ids.clone()),
                steps=STEPS,
                gpu=run.gpu,
                allocator=allocator,
            )
    tape = traced.tape.flatten()
    result = replay(tape.events, tape.sizes, tape.streams, allocator, marks=tape.marks)
    return {
        "allocated": result.peak_allocated_bytes,
        "reserved": result.peak_reserved_bytes,
        FIRST: max(phase.reserved_peak_bytes for phase in result.phases if phase.mark.step <= 1),
    }


def main() -> None:
    """Trace them and write the file."""
    lines = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(trace_titan(run))}" for name, run in RUNS.items()
    )
    torch = json.dumps(version("torch").partition("+")[0])
    FILE.write_text(f'{{\n  "torch": {torch},\n  "cases": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")
    print(f"traced {len(RUNS)} runs")


if __name__ == "__main__":
    main()
