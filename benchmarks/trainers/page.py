"""docs/trainers.md: what was run, with what, and how the trainers compare."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch

from benchmarks.trainers.case import ACCUMULATION, Size
from benchmarks.trainers.child import Outcome
from benchmarks.trainers.contest import REFERENCE, VARIANTS, loss_difference, rates, speed_ratio
from memplan.train.machine import describe_device, installed_versions

CLOCKS = {"cpu": "cpu_seconds", "cuda": "wall_seconds"}
METHODS = {"lora": "LoRA", "full": "Full fine-tuning"}
HEAD = """# Beside other trainers

Written by `python -m benchmarks.trainers`; do not edit. `memplan train`, transformers' Trainer with peft, and TRL's
SFTTrainer run the same job: the same weights, adapters, samples, order, optimizer and batches.
"""
METHOD = """## How it is measured

Each trainer is a process of its own with one thread, and they take turns, one optimizer step each, so that whatever
else the machine does meets all of them. A step is everything from one to the next: data, forward, backward, optimizer,
logging. The first four steps are not timed (a profiler counts memory in three of them), nor is the last.

* tokens/s: tokens that the loss is taken on, over the step's {clock}; the median. "speed" is that over Trainer's in the
  neighbouring step, the median of those ratios. "wall" is the same ratio by the clock on the wall.
* peak: the most that torch had allocated at once during steps, weights included: {meter}. "memory" is
  that over Trainer's.
* loss: the largest difference to Trainer's loss over all steps. Packing makes other batches, so it has none.

SFTTrainer takes head and loss in tiles, with a Triton kernel on a GPU. On a CPU it folds the tiles with plain
torch, which is not what it was made for; its speed there says nothing of a GPU.

## What makes their runs the same

* `train_sampling_strategy="sequential"`, over the samples in memplan's order. Their own shuffle is another one.
* `lr_scheduler_type="constant"`; their default falls linearly to zero. No warm-up, as is the default of all.
* `weight_decay` is set; their default is none, as memplan's. All three decay matrices and leave out norms and biases.
* `max_grad_norm=1.0`, their default; memplan clips only where it is set.
* `optim="adamw_torch_fused"`, their default and memplan's.
* A padding token of its own: a tokenizer that pads with its end of text loses the loss on ends of text.
* Adapters: peft draws them as the modules come; the drawn values are replaced by those that memplan draws.
* `gradient_checkpointing=False` and `bf16=False` for SFTTrainer, which turns both on.
* Nothing for the normalisation: all three divide the summed loss by the tokens of all micro batches of the step.
  Trainer does so since it passes `num_items_in_batch` to the model.
"""


def render(results: dict[str, dict[str, Outcome]], size: Size, device: str, dtype: str) -> str:
    """The whole page."""
    clock = "time on the processor" if device == "cpu" else "time on the wall"
    meter = (
        "torch's profiler replayed" if device == "cpu" else "the peak of the caching allocator's statistics"
    )
    parts = [HEAD, _setting(size, device, dtype)]
    for method, name in METHODS.items():
        found = table(results[method], device) if method in results else "Not run.\n"
        parts.append(f"## {name}\n\n{found}")
    parts.append(METHOD.format(clock=clock, meter=meter))
    return "\n".join(parts)


def table(outcomes: dict[str, Outcome], device: str) -> str:
    """A row for each trainer, beside transformers' Trainer."""
    lines = [
        "| trainer | tokens/s | speed | wall | peak MiB | memory | loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in VARIANTS:
        cells = _cells(outcomes[name], outcomes[REFERENCE], device) if name in outcomes else None
        lines.append(f"| {name} | {cells or 'not installed | | | | | '} |")
    return "\n".join(lines) + "\n"


def _cells(outcome: Outcome, reference: Outcome, device: str) -> str:
    clock = CLOCKS[device]
    speeds = [speed_ratio(outcome, reference, clock=clock) for clock in (clock, "wall_seconds")]
    timed = rates(outcome, clock)
    same_batches = outcome.tokens == reference.tokens
    cells = [
        f"{median(timed):,.0f}" if timed else "-",
        *("-" if speed is None else f"{speed:.2f}" for speed in speeds),
        f"{outcome.peak_bytes / 2**20:.1f}",
        f"{outcome.peak_bytes / reference.peak_bytes:.3f}",
        f"{loss_difference(outcome, reference):.1e}" if same_batches else "-",
    ]
    return " | ".join(cells)


def _setting(size: Size, device: str, dtype: str) -> str:
    versions = installed_versions()
    for name in ("accelerate", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    listed = ", ".join(f"{name} {number}" for name, number in versions.items() if name != "bitsandbytes")
    machine = describe_device(torch.device(device))["name"] if device == "cuda" else "a CPU, one thread"
    samples = f"{size.micro_batch_size} samples of {size.shortest} to {size.max_seq_len} random tokens"
    return (
        f"Llama with {size.layers} layers of width {size.hidden} and {size.vocab_size} tokens, {dtype}. Micro batches "
        f"of\n{samples}, {ACCUMULATION} for each of {size.steps} optimizer steps; AdamW with\nweight decay and "
        f"clipping. LoRA has rank 8 on all linear layers but the head. On {machine}, with\n{listed}.\n"
    )
