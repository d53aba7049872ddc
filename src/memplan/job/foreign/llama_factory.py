"""
A LLaMA-Factory config. Its defaults and what it does with them were read in LLaMA-Factory of August 2026 (ff6d4d1:
`hparams/`, `model/adapter.py`, `model/model_utils/`); what it leaves to TrainingArguments is transformers 5's.
"""

from __future__ import annotations

from memplan.job.foreign.keys import Keys
from memplan.job.foreign.sharding import read_deepspeed, read_fsdp
from memplan.job.foreign.training import (
    ATTENTION_HINT,
    ATTENTIONS,
    note_packing_mask,
    put_reentrant,
    read_evaluation,
    read_objective,
    read_run,
)
from memplan.job.parse import Block
from memplan.job.targets import is_pattern

_HARMLESS = {
    "template", "dataset", "dataset_dir", "eval_dataset", "media_dir", "max_samples", "overwrite_cache", "do_train",
    "do_eval", "do_predict", "preprocessing_num_workers", "preprocessing_batch_size", "overwrite_output_dir",
    "plot_loss", "report_to", "ddp_timeout", "resume_from_checkpoint", "trust_remote_code", "run_name", "cache_dir",
    "mask_history", "train_on_prompt", "mix_strategy", "interleave_probs", "streaming", "buffer_size", "tool_format",
    "default_system", "enable_thinking", "preserve_thinking", "tokenized_path", "group_by_length", "use_rslora",
    "train_sampling_strategy", "remove_unused_columns", "use_fast_tokenizer", "split_special_tokens", "model_revision",
    "use_cache", "use_kv_cache", "infer_backend", "infer_dtype", "hf_hub_token", "ms_hub_token", "om_hub_token",
    "print_param_status", "low_cpu_mem_usage", "predict_with_generate", "freeze_vision_tower", "create_new_adapter",
    "freeze_multi_modal_projector", "freeze_language_model", "compute_accuracy", "disable_shuffling",
    "early_stopping_steps", "include_effective_tokens_per_second", "eaft_alpha", "pissa_init",
    "bf16_full_eval", "tf32", "ignore_pad_token_for_loss", "eval_on_each_dataset", "data_shared_file_system",
    "val_size", "include_num_input_tokens_seen", "include_tokens_per_second",
    "ddp_find_unused_parameters", "push_to_hub",
}  # fmt: skip
"""Keys that say nothing of what a step takes."""

_HARMLESS_PREFIXES = (
    "image_", "video_", "audio_", "dataloader_", "logging_", "save", "swanlab_", "use_swanlab", "trackio_", "hub_",
    "generation_", "loraplus_", "pissa_", "freeze_trainable", "freeze_extra", "crop_", "use_audio", "hf_", "ray_",
    "vllm_", "sglang_", "export_", "dpo_", "kto_", "pref_", "ppo_", "lr_scheduler_kwargs",
)  # fmt: skip

_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
_OTHER_MODELS = (
    "use_dora", "resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config",
    "adapter_name_or_path", "use_llama_pro", "mixture_of_depths", "shift_attn", "upcast_layernorm",
    "upcast_lmhead_output", "use_unsloth", "use_kt", "use_mca", "use_megatron_bridge", "use_hyper_parallel", "fp8",
    "rope_scaling", "moe_aux_loss_coef", "use_v1_kernels", "quantization_device_map", "use_asft_loss",
    "use_dft_loss", "use_eaft_loss",
)  # fmt: skip


_MEGATRON = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "use_distributed_optimizer", "recompute_granularity",
)  # fmt: skip
"""Keys of its two ways into Megatron, which an environment variable chooses."""


def read_llama_factory(keys: Keys) -> None:
    """Take every key of the file."""
    has_data = "dataset" in keys or "tokenized_path" in keys
    if not keys.flag("do_train", has_data):
        keys.gap("it trains nothing", "name a file with `do_train: true`")
    keys.move("model_name_or_path", "model")
    keys.put("loop", "hf_trainer")
    # launcher.py sets it for several GPUs alone, which DeepSpeed's launch is by FORCE_TORCHRUN
    keys.put("allocator.expandable_segments", "deepspeed" in keys)
    stage = keys.text("stage") or "sft"
    if stage not in ("sft", "pt"):
        keys.gap(
            f"`stage: {stage}` is not planned",
            "memplan plans `sft` and `pt`, whose loss is that of the next token",
        )
    read_objective(keys, ("reward_model", "ref_model"))
    for key in _OTHER_MODELS:
        keys.refuse(
            key,
            "memplan plans full training and plain adapters of transformers' models; remove it to plan those",
        )
    megatron = next((key for key in _MEGATRON if key in keys), None)
    if megatron is not None:
        hint = "remove Megatron's keys to plan transformers' Trainer"
        keys.gap(f"a run on Megatron (`{megatron}`) is not planned", hint, line=keys.line(megatron))
        keys.leave(_MEGATRON)
    method = _read_method(keys)
    _read_precision(keys, method)
    keys.move("per_device_train_batch_size", "micro_batch_size", 8)
    keys.move("gradient_accumulation_steps", "gradient_accumulation_steps", 1)
    neatly = _read_rows(keys, stage)
    _read_checkpointing(keys)
    _read_kernels(keys, stage)
    note_packing_mask(keys, neatly)
    for key in _OPTIMIZERS:
        if keys.flag(key):
            keys.gap(
                f"`{key}: true` is not planned", "`--set optimizer=adamw` plans AdamW", field="optimizer"
            )
            keys.leave((), (key.removeprefix("use_"),))
    read_run(keys, schedule_default="linear", epochs_default=3)
    read_evaluation(keys)
    _read_devices(keys)
    keys.leave(_HARMLESS, _HARMLESS_PREFIXES)


def _read_rows(keys: Keys, stage: str) -> bool:
    """
    Rows of `cutoff_len`; those of `stage: sft` are padded to a multiple of 8 (train/sft/workflow.py), packed ones after
    one more token (data/processor/supervised.py). Returns whether packed documents are kept apart.
    """
    line = keys.line("cutoff_len")
    length = keys.whole("cutoff_len", 2048)
    neatly = keys.flag("neat_packing")
    key = "neat_packing" if neatly else "packing" if "packing" in keys else None
    packs = keys.flag("packing", stage == "pt") or neatly
    keys.put("packing", packs, key)
    rows = length if stage != "sft" else -(-(length + packs) // 8) * 8
    keys.put("max_seq_len", rows, "cutoff_len" if line else None, line)
    if rows != length:
        keys.note(
            f"rows of `cutoff_len: {length}` are padded to {rows} tokens, a multiple of 8"
            + (" after one more for packing" if packs else "")
        )
    return neatly


def _read_method(keys: Keys) -> str:
    line = keys.line("finetuning_type")
    kind = keys.text("finetuning_type") or "lora"
    bits_line = keys.line("quantization_bit")
    bits, by = keys.text("quantization_bit"), (keys.text("quantization_method") or "bnb").lower()
    if kind not in ("lora", "full"):
        hint = "`--set method=lora` or `full` plans those"
        keys.gap(f"`finetuning_type: {kind}` is not planned", hint, line=line, field="method")
    if bits is not None and (bits not in ("4", "8") or by not in ("bnb", "bitsandbytes")):
        hint = "`--set method=qlora` plans 4 bits of bitsandbytes, `lora` a 16-bit base"
        keys.gap(f"a base in {bits} bits by `{by}` is not planned", hint, line=bits_line, field="method")
    method = "qlora" if bits in ("4", "8") and kind == "lora" else "full" if kind == "full" else "lora"
    key = "finetuning_type" if line or not bits else "quantization_bit"
    keys.put("method", method, key if line or bits else None, line)
    keys.move("double_quantization", "quantization.double_quant", True)
    keys.move("quantization_type", "quantization.type", "nf4")
    if bits == "8":
        keys.put("quantization.type", "int8", "quantization_bit", bits_line)
    if method != "full":
        rank = keys.text("lora_rank") or "8"
        keys.put("lora.rank", rank, "lora_rank")
        keys.move("lora_alpha", "lora.alpha", 2 * float(rank) if rank.isdigit() else None)
        keys.move("lora_dropout", "lora.dropout", 0.0)
        target_line, target = keys.line("lora_target"), keys.take("lora_target")
        if isinstance(target, str) and is_pattern(target):  # a list to peft, whatever is in it
            target = [name.strip() for name in target.split(",")]
        keys.put(
            "lora.target_modules", target or "all-linear", "lora_target" if target else None, target_line
        )
        keys.put("lora.dtype", "float32")
    keys.leave((), ("lora_", "oft_"))
    return method


def _read_precision(keys: Keys, method: str) -> None:
    """Weights are loaded in 16 bits, and all that trains is cast to float32 unless `pure_bf16` says not to."""
    bf16, fp16, pure = keys.flag("bf16"), keys.flag("fp16"), keys.flag("pure_bf16")
    mixed = "bfloat16" if bf16 else "float16" if fp16 else None
    trained = "bfloat16" if pure or (mixed == "bfloat16" and "deepspeed" in keys) else "float32"
    keys.put("dtype", trained if method == "full" else mixed or "bfloat16", "pure_bf16" if pure else None)
    keys.put("autocast", mixed, "bf16" if bf16 else "fp16" if fp16 else None)
    if method == "qlora":  # `compute_dtype` (model/model_utils/quantization.py)
        keys.put("quantization.storage", mixed or "bfloat16")
    if method == "lora":
        keys.note(
            "weights are loaded in the checkpoint's dtype, taken as 16 bits; float32 ones are twice as large"
        )
    if "additional_target" in keys and method != "full":
        keys.move("additional_target", "lora.modules_to_save")
        keys.put("lora.modules_to_save_dtype", None if pure else "float32")
    keys.leave(("dtype", "torch_dtype", "additional_target"))


def _read_checkpointing(keys: Keys) -> None:
    off = keys.flag("disable_gradient_checkpointing")
    keys.leave(("gradient_checkpointing", "gradient_checkpointing_kwargs"))
    keys.put(
        "activation_checkpointing",
        "none" if off else "full",
        "disable_gradient_checkpointing" if off else None,
    )
    put_reentrant(keys, keys.flag("use_reentrant_gc", True))
    if keys.flag("use_unsloth_gc"):
        keys.put("activation_offload", not off, "use_unsloth_gc")


def _read_kernels(keys: Keys, stage: str) -> None:
    keys.choose("flash_attn", "attention", ATTENTIONS, "sdpa", hint=ATTENTION_HINT)
    liger = keys.flag("enable_liger_kernel")
    keys.put(
        "loss",
        "fused" if liger and stage in ("sft", "pt") else "full",
        "enable_liger_kernel" if liger else None,
    )
    keys.put("kernels", "liger" if liger else "torch", "enable_liger_kernel" if liger else None)
    if keys.flag("torch_compile"):
        keys.note("`torch_compile` is not planned: the step is planned as it runs without")


def _read_devices(keys: Keys) -> None:
    sharded, config = keys.take("fsdp"), keys.section("fsdp_config")
    config_keys = [
        key for key in ("fsdp_transformer_layer_cls_to_wrap", "fsdp_min_num_params") if key in keys
    ]
    keys.leave(config_keys)
    if sharded and str(sharded).lower() != "false":  # without it TrainingArguments pass over `fsdp_config`
        read_fsdp(keys, config, version=None, words=sharded, default_version="2")
    if "deepspeed" in keys:
        line = keys.line("deepspeed")
        given = keys.take("deepspeed")
        read_deepspeed(keys, given if isinstance(given, Block) else str(given), line)
