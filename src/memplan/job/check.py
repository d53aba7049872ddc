"""What no single field can tell: whether the fields of a job agree, and which of them have no effect."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from memplan.job.check_adapters import check_copies, check_special_tokens, check_targets
from memplan.job.check_gptq import check_gptq_base
from memplan.job.check_sharding import (
    check_8bit_base,
    check_degrees,
    check_fsdp1,
    check_storage,
    check_strategy,
)
from memplan.job.fields import job_fields
from memplan.job.problems import Conflict, listed, repeated_in
from memplan.job.spec import Job
from memplan.units import parse_bytes

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def check_job(job: Job) -> list[Conflict]:
    """Everything wrong between the fields of a job whose single values are in order."""
    checks = (
        check_degrees,
        check_strategy,
        check_fsdp1,
        check_storage,
        check_8bit_base,
        check_gptq_base,
        _check_npt_strategy,
        _check_low_bit,
        _check_padding_free,
        _check_npt_loop,
        _check_kernels,
        _check_flash_attention,
        _check_reentrant,
        _check_offload,
        _check_npt_layers,
        _check_npt_objective,
        _check_sample_prompts,
        _check_npt_target,
        check_targets,
        check_copies,
        check_special_tokens,
        _check_allocator,
        _check_margin,
        _check_schedule,
    )
    return [conflict for check in checks for conflict in check(job)]


def notes_on(job: Job, given: Collection[str]) -> tuple[str, ...]:
    """
    Sentences about settings that change nothing, for a job that is in order.

    Args:
        given: dotted fields that the user wrote; only those are worth a word.
    """
    notes: list[str] = []
    sections = {"lora": ("lora", "qlora"), "quantization": ("qlora",), "npt": ("npt",)}
    for section, methods in sections.items():
        idle = [name for name in given if name.startswith(f"{section}.")]
        if section == "quantization" and job.has_quantized_base:
            peft_only = "quantization.kbit_preparation"
            idle = [peft_only] if job.method != "qlora" and peft_only in idle else []
        if idle and job.method not in methods:
            has = "has" if len(idle) == 1 else "have"
            notes.append(
                f"{listed(idle, 'and')} {has} no effect with `method: {job.method}`; "
                f"only {listed(methods, 'and')} {'uses' if len(methods) == 1 else 'use'} `{section}`"
            )
    if job.train.sample_prompts and job.data.eval is None and "train.sample_prompts" in given:
        notes.append("`train.sample_prompts` has no effect without `data.eval`")
    ends = job.npt.objective == "end_to_end"
    names = ("npt.stream", "npt.curriculum_steps") if ends else ("npt.logits_weight", "npt.temperature")
    idle = [name for name in names if name in given]
    if job.method == "npt" and idle:
        has = "has" if len(idle) == 1 else "have"
        notes.append(f"{listed(idle, 'and')} {has} no effect with `npt.objective: {job.npt.objective}`")
    uses = {"diag": "npt.modulation_scale", "outer": "npt.components"}.get(job.npt.variant)
    for name in ("npt.components", "npt.modulation_scale"):
        if job.method == "npt" and name != uses and name in given:
            notes.append(f"`{name}` has no effect with `npt.variant: {job.npt.variant}`")
    upcasts = job.loop == "hf_trainer" and job.parallel.strategy != "NO_SHARD"  # accelerate does, under FSDP
    if job.method == "full" and job.autocast == job.dtype and not upcasts:
        notes.append(
            f"weights that train in {job.dtype} have no float32 copy under `autocast: {job.autocast}`; mixed "
            "precision is `dtype: float32` with it"
        )
    idle = [f"quantization.{name}" for name in ("double_quant", "storage") if job.has_8bit_base]
    idle = [name for name in idle if name in given]
    if idle:
        has = "has" if len(idle) == 1 else "have"
        notes.append(f"{listed(idle, 'and')} {has} no effect with `quantization.type: int8`")
    elif job.loop == "memplan" and job.has_quantized_base and "quantization.storage" in given:
        notes.append("`quantization.storage` has no effect with `loop: memplan`, which shards bytes as well")
    runs_once = job.loop == "memplan" or job.activation_checkpointing == "none"
    if job.use_reentrant and runs_once and "use_reentrant" in given:
        where = "in memplan's own loop" if job.loop == "memplan" else "without `activation_checkpointing`"
        notes.append(f"`use_reentrant` has no effect {where}")
    if job.attention_kernel != "auto" and job.attention != "sdpa":
        notes.append(f"`attention_kernel` has no effect with `attention: {job.attention}`")
    if job.activation_offload and job.activation_checkpointing == "none":
        notes.append("`activation_offload` has no effect without `activation_checkpointing`")
    has_steps = job.train.epochs is None
    if has_steps and job.train.num_warmup_steps >= job.train.max_steps and job.train.num_warmup_steps > 0:
        notes.append(
            f"`train.warmup_steps` {job.train.num_warmup_steps} is not below `train.max_steps` "
            f"{job.train.max_steps}: the learning rate never reaches its peak"
        )
    return tuple(notes)


def _check_npt_strategy(job: Job) -> Iterator[Conflict]:
    strategy = job.parallel.strategy
    if job.method == "npt" and strategy.startswith("ZERO_"):
        yield Conflict(
            ("method", "parallel.strategy"),
            f"`method: npt` trains in memplan's own loop, which DeepSpeed's `{strategy}` does not run",
            "set `parallel.strategy: FULL_SHARD`, or `NO_SHARD` with `parallel.dp_replicate`",
        )


def _check_low_bit(job: Job) -> Iterator[Conflict]:
    if not job.optimizer.startswith("ao_"):
        return
    if job.loop == "memplan":
        yield Conflict(
            ("optimizer", "loop"),
            f"`optimizer: {job.optimizer}` is torchao's, which memplan's own loop does not run",
            "set `loop: hf_trainer` or `script`, or use `optimizer: adamw_8bit`, bitsandbytes'",
        )
    refused = {
        f"parallel.strategy: {job.parallel.strategy}": job.parallel.strategy.startswith("ZERO_"),
        "offload.params: true": job.offload.params,
        "offload.optimizer: true": job.offload.optimizer,
    }
    for setting, is_set in refused.items():
        if is_set:
            yield Conflict(
                ("optimizer", setting.partition(":")[0]),
                f"`optimizer: {job.optimizer}` is not planned with `{setting}`",
                "use `optimizer: adamw`, or FSDP2 (`parallel.strategy: FULL_SHARD`) without offload",
            )


def _check_padding_free(job: Job) -> Iterator[Conflict]:
    if job.padding_free and job.loop != "hf_trainer":
        yield Conflict(
            ("padding_free", "loop"),
            f"`padding_free` is of TRL's and transformers' collators, which `loop: {job.loop}` does not use",
            "set `loop: hf_trainer`; memplan's own loop keeps documents apart with `packing: true`",
        )


def _check_npt_loop(job: Job) -> Iterator[Conflict]:
    if job.method == "npt" and job.loop != "memplan":
        yield Conflict(
            ("method", "loop"),
            f"`method: npt` trains in memplan's own loop, not in `loop: {job.loop}`",
            "leave `loop` out, or set `loop: memplan`",
        )


def _check_kernels(job: Job) -> Iterator[Conflict]:
    if job.kernels == "liger" and job.loop == "memplan":
        yield Conflict(
            ("kernels", "loop"),
            "`kernels: liger` is for models that Liger has changed, which memplan's own loop does not run",
            "set `loop: hf_trainer`, or `loss: fused` alone, which it runs",
        )


def _check_reentrant(job: Job) -> Iterator[Conflict]:
    if not job.use_reentrant or job.loop == "memplan" or job.activation_checkpointing == "none":
        return
    not_planned = [
        ("activation_checkpointing", "selective", job.activation_checkpointing == "selective"),
        ("activation_offload", "true", job.activation_offload),
        (
            "parallel.strategy",
            job.parallel.strategy,
            job.parallel.strategy not in ("NO_SHARD", "ZERO_1", "ZERO_2"),
        ),
    ]
    for field, value, is_set in not_planned:
        if is_set:
            yield Conflict(
                ("use_reentrant", field),
                f"`use_reentrant` is not planned with `{field}: {value}`",
                "leave `use_reentrant` out, which plans transformers' default, or set that to something else",
            )


def _check_flash_attention(job: Job) -> Iterator[Conflict]:
    if job.attention == "flash_attention_2" and job.dtype == "float32" and job.autocast is None:
        yield Conflict(
            ("attention", "dtype"),
            "`attention: flash_attention_2` has no float32 kernels, and `dtype: float32` has no `autocast` here",
            "set `autocast: bfloat16`, `dtype: bfloat16`, or `attention: sdpa`",
        )


def _check_offload(job: Job) -> Iterator[Conflict]:
    strategy = job.parallel.strategy
    if job.offload.params and strategy in ("ZERO_1", "ZERO_2"):
        yield Conflict(
            ("offload.params", "parallel.strategy"),
            f"`offload.params` has nothing to fetch with `{strategy}`, which keeps whole weights on every GPU",
            "set `offload.optimizer: true` in its place, or `parallel.strategy: ZERO_3`",
        )
    if job.offload.activations != "none" and job.loop != "hf_trainer":
        yield Conflict(
            ("offload.activations", "loop"),
            f"`offload.activations` is TRL's and axolotl's, which `loop: {job.loop}` does not have",
            "set `loop: hf_trainer`, or `activation_offload: true` with `activation_checkpointing: full`",
        )
    if job.offload.activations != "none" and job.activation_offload:
        yield Conflict(
            ("offload.activations", "activation_offload"),
            "`offload.activations` moves the inputs of blocks, which `activation_offload` moves too",
            "leave one of them out",
        )
    if job.offload.optimizer and job.loop == "hf_trainer" and not strategy.startswith("ZERO_"):
        yield Conflict(
            ("offload.optimizer", "loop"),
            "transformers' Trainer (`loop: hf_trainer`) has `offload.optimizer` under DeepSpeed's ZeRO only",
            "set `parallel.strategy: ZERO_2`, or leave `offload.optimizer` out",
        )


def _check_npt_layers(job: Job) -> Iterator[Conflict]:
    layers = job.npt.layers
    if isinstance(layers, str):
        return
    reason = None
    if not layers:
        reason = "is an empty list"
    elif min(layers) < 0:
        reason = f"holds {min(layers)}, but blocks count from 0"
    elif (repeated := repeated_in(layers)) is not None:
        reason = f"names block {repeated} twice"
    if reason:
        hint = "list the blocks to convert once each, e.g. `npt: {layers: [16, 17]}`, or `upper_half`"
        yield Conflict(("npt.layers",), f"`npt.layers` {reason}", hint)


def _check_npt_target(job: Job) -> Iterator[Conflict]:
    if job.method == "npt" and job.npt.target == "all" and job.npt.variant == "diag":
        yield Conflict(
            ("npt.target", "npt.variant"),
            "`npt.variant: diag` reads attention outputs by the matrix that reads the layer's input, which must be of "
            "their size: that is so of the MLP's input matrices only",
            "set `npt.variant: linear`, or `npt.target: gate_up`",
        )


def _check_sample_prompts(job: Job) -> Iterator[Conflict]:
    train = job.train
    if train.sample_prompts and train.sample_tokens >= job.max_seq_len:
        yield Conflict(
            ("train.sample_tokens", "max_seq_len"),
            f"`train.sample_tokens` is {train.sample_tokens}, and a prompt and its continuation have `max_seq_len` "
            f"{job.max_seq_len} tokens at most",
            f"set `train.sample_tokens: {max(1, job.max_seq_len // 2)}`",
        )


def _check_npt_objective(job: Job) -> Iterator[Conflict]:
    if job.method != "npt" or job.npt.objective != "end_to_end":
        return
    if job.npt.logits_weight > 1:
        yield Conflict(
            ("npt.logits_weight",),
            f"`npt.logits_weight` is {job.npt.logits_weight:g}, and a share is 1 at most",
            "set a number from 0 to 1",
        )
    if job.npt.logits_weight and job.has_quantized_base and "lm_head" not in job.quantization.skip:
        yield Conflict(
            ("npt.logits_weight", "quantization.skip"),
            "`npt.logits_weight` needs the head's weight, which is quantised",
            "keep `lm_head` in `quantization.skip`, or set `npt.logits_weight: 0`",
        )
    if job.parallel.strategy != "NO_SHARD" or job.offload.params:
        yield Conflict(
            ("npt.objective", "parallel.strategy"),
            "`npt.objective: end_to_end` runs on whole models only",
            "set `parallel.strategy: NO_SHARD` without `offload.params`, or `npt.objective: layer`",
        )
    if job.activation_checkpointing != "none":
        yield Conflict(
            ("npt.objective", "activation_checkpointing"),
            "`npt.objective: end_to_end` runs without activation checkpointing only",
            "set `activation_checkpointing: none`, or `npt.objective: layer`, which holds one block at a time",
        )


def _check_allocator(job: Job) -> Iterator[Conflict]:
    divisions = job.allocator.roundup_power2_divisions
    if divisions is not None and divisions & (divisions - 1):
        yield Conflict(
            ("allocator.roundup_power2_divisions",),
            f"`allocator.roundup_power2_divisions` is {divisions}, which is no power of two",
            "use 1, 2, 4, 8 or 16",
        )


def _check_schedule(job: Job) -> Iterator[Conflict]:
    train = job.train
    if train.epochs is not None and train.max_steps != job_fields()["train.max_steps"].default:
        yield Conflict(
            ("train.epochs", "train.max_steps"),
            "`train.epochs` and `train.max_steps` both say how long the run is",
            "leave one of them out",
        )
    if train.warmup_ratio is not None and train.warmup_steps:
        yield Conflict(
            ("train.warmup_steps", "train.warmup_ratio"),
            "`train.warmup_steps` and `train.warmup_ratio` both say how long the warm-up is",
            "leave one of them out",
        )
    if job.data.eval is None and (train.eval_every is not None or train.early_stopping is not None):
        field = "train.eval_every" if train.eval_every is not None else "train.early_stopping"
        yield Conflict(
            (field, "data.eval"),
            f"`{field}` is set, and there is nothing to evaluate on",
            "name the data with `data.eval`, or leave it out",
        )
    if train.min_learning_rate > train.learning_rate:
        yield Conflict(
            ("train.min_learning_rate", "train.learning_rate"),
            f"`train.min_learning_rate` {train.min_learning_rate:g} is above `train.learning_rate` "
            f"{train.learning_rate:g}",
            "set it below the peak",
        )


def _check_margin(job: Job) -> Iterator[Conflict]:
    if job.margin is None:
        return
    percent = _PERCENT.fullmatch(job.margin)
    if percent is not None:
        valid = float(percent[1]) < 100
    else:
        size = parse_bytes(job.margin)
        valid = size == 0 or (size is not None and not job.margin.strip()[-1].isdigit())
    if not valid:
        yield Conflict(
            ("margin",),
            f"`margin` is `{job.margin}`, which is neither a share nor a size",
            "write e.g. `margin: 5%` (below 100%) or `margin: 1GiB`; null is the engine's own error band",
        )
