"""Changes of a job in the words of the tool whose file it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OPTIMIZERS = {"adamw_8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit"}
"""Where transformers' name differs."""

_BY_VALUE: dict[str, dict[tuple[str, Any], str]] = {
    "axolotl": {
        ("loss", "fused"): "plugins: [axolotl.integrations.liger.LigerPlugin]\nliger_fused_linear_cross_entropy: true",
        ("kernels", "liger"): "liger_rope: true\nliger_rms_norm: true\nliger_glu_activation: true",
        ("activation_checkpointing", "full"): "gradient_checkpointing: true",
        ("activation_offload", True): "activation_offloading: hidden_states",
        ("use_reentrant", True): "gradient_checkpointing_kwargs: {use_reentrant: true}",
        ("method", "qlora"): "adapter: qlora\nload_in_4bit: true",
        ("quantization.type", "nf4"): "adapter: qlora\nload_in_4bit: true\nload_in_8bit: false",
        ("quantization.storage", "bfloat16"): "bnb_config_kwargs: {bnb_4bit_quant_storage: bfloat16}",
        ("quantization.storage", "float16"): "bnb_config_kwargs: {bnb_4bit_quant_storage: float16}",
        ("lora.dtype", "bfloat16"): "peft_autocast_adapter_dtype: false",
        ("optimizer_kernel", "fused"): "optimizer: adamw_torch_fused",
        ("dtype", "bfloat16"): "bf16: full",
        ("autocast", None): "bf16: full",
        ("parallel.strategy", "FULL_SHARD"): "fsdp_version: 2\nfsdp_config: {reshard_after_forward: true}",
        ("parallel.strategy", "SHARD_GRAD_OP"): "fsdp_version: 2\nfsdp_config: {reshard_after_forward: false}",
    },
    "LLaMA-Factory": {
        ("loss", "fused"): "enable_liger_kernel: true",
        ("kernels", "liger"): "enable_liger_kernel: true",
        ("activation_checkpointing", "full"): "disable_gradient_checkpointing: false",
        ("activation_offload", True): "use_unsloth_gc: true",
        ("use_reentrant", True): "use_reentrant_gc: true",
        ("method", "qlora"): "quantization_bit: 4",
        ("quantization.type", "nf4"): "quantization_bit: 4",
        ("quantization.double_quant", True): "double_quantization: true",
        ("optimizer_kernel", "fused"): "optim: adamw_torch_fused",
        ("dtype", "bfloat16"): "pure_bf16: true",
        ("autocast", None): "bf16: false",
        ("parallel.strategy", "FULL_SHARD"): "# for accelerate: fsdp_version 2, reshard_after_forward true",
        ("parallel.strategy", "SHARD_GRAD_OP"): "# for accelerate: fsdp_version 2, reshard_after_forward false",
    },
    "TRL": {
        ("activation_checkpointing", "full"): "gradient_checkpointing: true",
        ("use_reentrant", True): "gradient_checkpointing_kwargs: {use_reentrant: true}",
        ("method", "qlora"): "load_in_4bit: true",
        ("quantization.type", "nf4"): "load_in_4bit: true\nload_in_8bit: false",
        ("quantization.double_quant", True): "use_bnb_nested_quant: true",
        ("optimizer_kernel", "fused"): "optim: adamw_torch_fused",
        ("dtype", "bfloat16"): "dtype: bfloat16",
        ("autocast", None): "bf16: false",
        ("parallel.strategy", "FULL_SHARD"): "accelerate_config: fsdp2",
    },
}  # fmt: skip
"""Lines of the file that stand for a value of a field."""

_ALLOCATOR = "# in the environment: PYTORCH_ALLOC_CONF=expandable_segments:True"

_OFFLOAD = "# in DeepSpeed's file: zero_optimization: {offload_optimizer: {device: cpu}}"

_BY_FIELD: dict[str, dict[str, str]] = {
    "axolotl": {
        "micro_batch_size": "micro_batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps",
        "max_seq_len": "sequence_len", "optimizer": "optimizer", "attention": "attn_implementation",
        "lora.rank": "lora_r", "lora.target_modules": "lora_target_modules", "parallel.dp_shard": "dp_shard_size",
        "parallel.dp_replicate": "dp_replicate_size",
    },
    "LLaMA-Factory": {
        "micro_batch_size": "per_device_train_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation_steps", "max_seq_len": "cutoff_len", "optimizer": "optim",
        "attention": "flash_attn", "lora.rank": "lora_rank", "lora.target_modules": "lora_target",
        "parallel.dp_shard": "# GPUs that share a model", "parallel.dp_replicate": "# GPUs with a model each",
        "quantization.storage": "# set by itself, as bnb_4bit_quant_storage",
    },
    "TRL": {
        "micro_batch_size": "per_device_train_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation_steps", "max_seq_len": "max_length", "optimizer": "optim",
        "attention": "attn_implementation", "lora.rank": "lora_r", "lora.target_modules": "lora_target_modules",
        "parallel.dp_shard": "num_processes", "parallel.dp_replicate": "num_processes",
        "quantization.storage": "bnb_4bit_quant_storage",
    },
}  # fmt: skip
"""Keys whose values are a field's."""


def lines_for(tool: str | None, edits: Mapping[str, Any], *, packs: bool = False) -> list[str] | None:
    """
    The lines that make the same change in the tool's own file.

    Args:
        packs: the job packs; LLaMA-Factory's packed rows have one token more than its `cutoff_len`.

    >>> lines_for("axolotl", {"max_seq_len": 1024})
    ['sequence_len: 1024']

    Returns:
        None where the job was read from no other tool's file, or the tool has no words for all of it.
    """
    if tool is None:
        return None
    lines: list[str] = []
    for field, value in edits.items():
        if (
            (field, value) == ("parallel.dp_replicate", 1)
            and "parallel.dp_shard" in edits
            and tool != "axolotl"
        ):
            continue  # their launchers count processes
        words = None if isinstance(value, (list, tuple)) else _BY_VALUE[tool].get((field, value))
        key = _BY_FIELD[tool].get(field)
        if words is not None:
            lines += [line for line in words.split("\n") if line not in lines]
        elif (field, value) == ("allocator.expandable_segments", True):
            lines.append(_ALLOCATOR)
        elif (field, value) == ("offload.optimizer", True):
            lines.append(_OFFLOAD)
        elif key is not None:
            one_more = packs and (tool, field) == ("LLaMA-Factory", "max_seq_len")
            lines.append(f"{key}: {_written(field, value - 1 if one_more else value, tool)}")
        else:
            return None
    return list(dict.fromkeys(lines))


def _written(field: str, value: Any, tool: str) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(value) if tool == "LLaMA-Factory" else f"[{', '.join(value)}]"
    if field == "attention" and tool == "LLaMA-Factory":
        return {"flash_attention_2": "fa2", "eager": "disabled"}.get(value, value)
    return str(_OPTIMIZERS.get(value, value))
