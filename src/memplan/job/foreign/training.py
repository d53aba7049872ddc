"""What trainers on top of transformers have in common: its TrainingArguments."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from memplan.job.foreign.keys import Keys
from memplan.job.problems import shorten
from memplan.job.targets import ALL_LINEAR, is_pattern

ATTENTIONS = {
    "eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash_attention_2", "fa2": "flash_attention_2",
    "kernels-community/flash-attn2": "flash_attention_2", "disabled": "eager",
}  # fmt: skip
"""Names of attention that a job has one for."""

ATTENTION_HINT = "`--set attention=flash_attention_2` plans a kernel that holds as little, `sdpa` torch's own"

_ALONE = "memplan plans supervised fine-tuning and NPT; there is no field that stands for this"


def put_reentrant(keys: Keys, is_reentrant: bool) -> None:
    """How blocks are checkpointed matters beside an 8-bit base; elsewhere both ways save the same."""
    if keys.value("quantization.type") == "int8":
        keys.put("use_reentrant", is_reentrant)


def note_packing_mask(keys: Keys, packs: bool) -> None:
    """transformers keeps documents of a row apart by a mask, where the kernel does not."""
    attention = keys.value("attention")
    if packs and attention in ("eager", "sdpa"):
        keys.note(
            f"packed rows with `{attention}` attention have a mask of tokens x tokens, which is not planned: "
            "flash attention needs none"
        )


def put_targets(keys: Keys, wanted: Any, line: int | None) -> None:
    """`lora_target_modules` as peft reads it: a list of names, or one text, which is a pattern."""
    key, field = "lora_target_modules", "lora.target_modules"
    if isinstance(wanted, str) and wanted != ALL_LINEAR and not is_pattern(wanted):
        hint = (
            f"write a list, or a pattern such as `.*\\.{wanted}`; `--set {field}=[{wanted}]` plans the name"
        )
        message = f"`{key}: {shorten(wanted)}` reaches peft as a pattern for whole names, which no layer has"
        keys.gap(message, hint, line=line, field=field)
        return
    keys.put(field, wanted, key, line)


def of_blocks(names: Iterable[Any], layers: Iterable[Any]) -> str:
    """
    The pattern that stands for these names in these blocks: peft takes the first number in a name for the block's
    (peft/tuners/tuners_utils.py, check_target_module_exists).
    """
    chosen, wanted = "|".join(map(str, layers)), "|".join(re.escape(str(name)) for name in names)
    return rf"(?:(?!\d+\.)[^.]+\.){{2,}}(?:{chosen})\.(?:.*\.)?(?:{wanted})"


def read_objective(keys: Keys, names: Iterable[str]) -> None:
    """Keys that ask for another loss than that of the next token."""
    for name in names:
        keys.refuse(name, _ALONE)


def read_run(
    keys: Keys, *, schedule_default: str, epochs_default: float, learning_rate_default: float | None = None
) -> None:
    """
    Optimizer, learning rate and length of the run, with TrainingArguments' defaults (transformers 5).

    Args:
        schedule_default: where no schedule is named.
        epochs_default: where neither steps nor epochs are.
        learning_rate_default: where there is none; None: the job's.
    """
    keys.move("optim" if "optim" in keys else "optimizer", "optimizer", "adamw_torch_fused")
    for key in ("optim_args", "optim_target_modules", "neftune_noise_alpha"):
        keys.refuse(key, "remove it to plan the run without")
    line, norm = keys.line("max_grad_norm"), keys.number("max_grad_norm", 1.0)
    keys.put("train.max_grad_norm", norm if norm > 0 else None, "max_grad_norm" if line else None, line)
    keys.move("learning_rate", "train.learning_rate", learning_rate_default)
    keys.move("weight_decay", "train.weight_decay")
    for key, field in (("adam_beta1", "beta1"), ("adam_beta2", "beta2"), ("adam_epsilon", "epsilon")):
        keys.move(key, f"train.{field}")
    keys.move("output_dir", "train.output_dir")
    keys.move("seed", "train.seed", 42)
    epochs = "num_epochs" if "num_epochs" in keys else "num_train_epochs"
    line, steps = keys.line("max_steps"), keys.number("max_steps", -1)
    if steps > 0:
        keys.put("train.max_steps", f"{steps:g}", "max_steps", line)
        keys.take(epochs)
    else:
        keys.move(epochs, "train.epochs", epochs_default)
    _read_schedule(keys, schedule_default)
    keys.leave(
        ("adam_eps", "adam_beta3", "lr_quadratic_warmup", "embedding_lr", "use_cpu"), ("lr_", "cosine_")
    )


def _read_schedule(keys: Keys, default: str) -> None:
    key = "lr_scheduler_type" if "lr_scheduler_type" in keys else "lr_scheduler"
    word = keys.text(key) or default
    if word in ("constant", "constant_with_warmup", "linear", "cosine"):
        keys.put("train.schedule", "constant" if word.startswith("constant") else word, key)
    else:
        keys.note(
            f"`{key}: {shorten(word)}` is left out: the learning rate is constant after the warm-up here"
        )
    steps, ratio = keys.number("warmup_steps", 0), keys.number("warmup_ratio", 0)
    if steps >= 1:
        keys.put("train.warmup_steps", int(steps), "warmup_steps")
    elif steps or ratio:
        keys.put("train.warmup_ratio", steps or ratio, "warmup_steps" if steps else "warmup_ratio")


def read_evaluation(keys: Keys) -> None:
    """Evaluation of transformers' Trainer, which no job plans and whose batch is not the training's."""
    strategy = keys.text("eval_strategy") or "no"
    size = keys.text("per_device_eval_batch_size")
    keys.leave((), ("eval",))
    if strategy != "no":
        batch = f"batches of {size} (`per_device_eval_batch_size`)" if size else "batches of 8, the default"
        keys.note(
            f"evaluation is not planned: it runs with {batch}, without gradients, and holds their logits"
        )
