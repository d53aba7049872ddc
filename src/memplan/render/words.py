"""
The words that every rendering shares: headlines, names of categories and phases, one tensor in one phrase.
"""

from __future__ import annotations

from typing import Any

from memplan.budget.result import Change, Peak, PhaseLine, Result, TensorLine
from memplan.job.spec import Job
from memplan.tape.tape import CATEGORIES, PHASES
from memplan.units import format_bytes

STATES = {"fits": "fits", "tight": "tight", "does_not_fit": "does not fit", "unknown": "cannot tell"}
STATE_STYLES = {"fits": "bold green", "tight": "bold yellow", "does_not_fit": "bold red", "unknown": "bold"}

CATEGORY_NAMES = {
    "weights": "weights",
    "quant_state": "quantization state",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "logits_loss": "logits and loss",
    "inputs": "inputs",
    "workspace": "workspace",
    "comm": "communication",
    "unknown": "unknown",
    "context": "CUDA context",
    "nccl": "NCCL",
}
PHASE_NAMES = {
    "load": "load",
    "forward": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer step",
    "evaluation": "evaluation",
}
METHOD_NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA", "npt": "NPT layers"}
LOOP_NAMES = {"hf_trainer": "transformers' Trainer", "script": "a script's loop"}
TIERS = ("free", "slower", "changes numerics", "changes the data", "changes the model")
"""What a change of each tier costs."""


def headline(result: Result) -> tuple[str, str]:
    """
    (state in words, sentence): the verdict with both numbers, or the need where no capacity was asked about.
    """
    if result.verdict is not None:
        return STATES[result.verdict.state], result.verdict.reason
    return "needs " + format_bytes(result.need_bytes), "per GPU"


def band(result: Result) -> str:
    """
    The error band and where it comes from, e.g. `error band 12.10 GiB to 12.60 GiB (recorded accuracy)`; of a
    recording, which has none, how its need was found.
    """
    error = result.error_band
    if error is None:
        return "the smallest memory in which these allocations complete, found by replaying them"
    source = f" ({error.source})" if error.source else ""
    return f"error band {format_bytes(error.low_bytes)} to {format_bytes(error.high_bytes)}{source}"


def peak_moment(peak: Peak) -> str:
    """When the peak is, e.g. `in backward of step 2`; loading has no step."""
    phase = PHASE_NAMES.get(peak.phase, peak.phase)
    return f"in {phase} of step {peak.step}" if peak.step else f"in {phase}"


def tensor_phrase(tensor: TensorLine) -> str:
    """Shape and dtype, e.g. `[2, 4096, 32000] float32`; empty where neither is known."""
    shape = "[" + ", ".join(map(str, tensor.shape)) + "]" if tensor.shape is not None else ""
    return f"{shape} {tensor.dtype or ''}".strip()


def subject(result: Result) -> str:
    """What a result is about: the model of its job, or the file of a recording."""
    return result.job.model if result.job is not None else result.engine["file"]


def job_phrase(job: Job) -> str:
    """
    What of a job decides most of its memory, defaults included.

    >>> job_phrase(Job(model="gpt2", micro_batch_size=4, gradient_accumulation_steps=2))
    'LoRA of rank 16 on gpt2 in bfloat16, 4 x 2048 tokens (2 times a step), no checkpointing, adamw, 1 GPU'
    """
    method = METHOD_NAMES["lora" if job.has_8bit_base else job.method]
    if job.method in ("lora", "qlora"):
        method += f" of rank {job.lora.rank}"
    if job.method == "qlora":
        method += f" ({job.quantization.type})"
    size = f"{job.micro_batch_size} x {job.max_seq_len} tokens"
    if job.gradient_accumulation_steps > 1:
        size += f" ({job.gradient_accumulation_steps} times a step)"
    checkpointing = "no" if job.activation_checkpointing == "none" else job.activation_checkpointing
    return ", ".join(
        (
            f"{method} on {job.model} in {job.dtype}",
            *([f"autocast to {job.autocast}"] if job.autocast else []),
            size,
            f"{checkpointing} checkpointing",
            job.optimizer,
            _gpus(job),
            *([LOOP_NAMES[job.loop]] if job.loop != "memplan" else []),
        )
    )


def _gpus(job: Job) -> str:
    if job.world_size == 1:
        return "1 GPU"
    strategy = job.parallel.strategy
    return f"{'DDP' if strategy == 'NO_SHARD' else strategy} on {job.world_size} GPUs"


def is_lint(message: str) -> bool:
    """
    Whether a warning of a result is a lint, which ends in its code; the others are notes.

    >>> is_lint("eager attention holds scores; use sdpa [eager-attention]"), is_lint("a context of [1, 2]")
    (True, False)
    """
    import re

    return re.search(r"\[[a-z][a-z0-9-]+\]$", message) is not None


def worst_phases(result: Result) -> list[PhaseLine]:
    """The highest moment of each phase over all steps, in the order of the phases."""
    names = [*PHASES, *(line.phase for line in result.phases if line.phase not in PHASES)]
    worst = []
    for name in dict.fromkeys(names):
        lines = [line for line in result.phases if line.phase == name]
        if lines:
            worst.append(max(lines, key=lambda line: line.allocated_peak_bytes))
    return worst


def categories_in(phases: list[PhaseLine]) -> list[str]:
    """Categories that hold something in any of the phases, in the order of the tape's categories."""
    present = {line.category for phase in phases for line in phase.budget if line.bytes}
    return [name for name in CATEGORIES if name in present] + sorted(present.difference(CATEGORIES))


def category_bytes(phase: PhaseLine, category: str) -> int:
    """Bytes of a category at the highest moment of a phase."""
    return sum(line.bytes for line in phase.budget if line.category == category)


def tier_words(change: Change) -> str:
    """What the tier of a change costs, in a word or two."""
    return TIERS[change.tier] if 0 <= change.tier < len(TIERS) else f"tier {change.tier}"


def set_flags(edits: dict[str, Any]) -> str:
    """
    The edits of a change as flags to paste.

    >>> set_flags({"micro_batch_size": 1, "quantization.skip": ("lm_head",), "activation_offload": True})
    "--set micro_batch_size=1 --set 'quantization.skip=[lm_head]' --set activation_offload=true"
    """
    import shlex

    return " ".join("--set " + shlex.quote(f"{name}={setting_text(value)}") for name, value in edits.items())


def setting_text(value: Any) -> str:
    """
    A value as a job file spells it.

    >>> setting_text(None), setting_text(False), setting_text((16, 17)), setting_text("full")
    ('null', 'false', '[16, 17]', 'full')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(setting_text(item) for item in value) + "]"
    return str(value)
