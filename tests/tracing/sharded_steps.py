"""
Steps of models that the user has sharded, run by two processes of gloo: `python sharded_steps.py RANK FOLDER`.

Rank 0 writes the peak of each to `FOLDER/peaks.json`, as torch's profiler has it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

WORLD_SIZE = 2
WIDTH, LENGTH, WORDS = 64, 512, 320
STEPS = 2


class Block(nn.Module):
    """A gated layer of two products, and one back."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Model(nn.Module):
    """Token ids to logits, the blocks called as `call(block, hidden)`."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids)
        for block in self.blocks:
            hidden = self.call(block, hidden)
        return self.head(hidden)


def _keep_every_second(
    seen: Counter[bool], context: Any, operation: Any, *_: Any, **__: Any
) -> CheckpointPolicy:
    if operation != torch.ops.aten.mm.default:
        return CheckpointPolicy.PREFER_RECOMPUTE
    seen[context.is_recompute] += 1
    return CheckpointPolicy.MUST_SAVE if seen[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE


def _selective(block: nn.Module, hidden: Tensor) -> Tensor:
    def contexts() -> Any:
        return create_selective_checkpoint_contexts(partial(_keep_every_second, Counter()))

    return checkpoint(block, hidden, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)


def _full(block: nn.Module, hidden: Tensor) -> Tensor:
    return checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False)


def _plain(block: nn.Module, hidden: Tensor) -> Tensor:
    return block(hidden)


CASES: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "whole": (_plain, True),
    "not resharded": (_plain, False),
    "checkpointed": (_full, True),
    "selective": (_selective, True),
}
"""How blocks are called, and whether they are resharded after forward."""


def make(name: str) -> tuple[Callable[[Tensor], Tensor], nn.Module, torch.optim.Optimizer, Tensor]:
    """Step, model, optimizer and batch; the model is made on the current device and sharded over all ranks."""
    call, reshards = CASES[name]
    model = Model(call)
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshards)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def step(ids: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step, model, optimizer, torch.zeros(2, LENGTH, dtype=torch.int64, device="cpu")


def measured_peak(name: str) -> int:
    """Bytes of live tensors at the peak of real steps, on this rank."""
    from memplan.train.measure import CpuMeter

    step, model, _, batch = make(name)
    meter = CpuMeter(STEPS)
    meter.begin("load", 0)
    meter.adopt(model)
    held = None
    for number in range(1, STEPS + 1):
        meter.begin("step", number)
        fresh = batch.clone()
        held = step(fresh)
        meter.end_step(number)
    del held
    peak = meter.peak_bytes()
    assert peak is not None
    return peak


def main(rank: int, folder: Path) -> None:
    """Both ranks run every case, one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    peaks = {name: measured_peak(name) for name in CASES}
    if rank == 0:
        (folder / "peaks.json").write_text(json.dumps(peaks))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
