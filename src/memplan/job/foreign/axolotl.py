"""
An axolotl config. Its defaults and what it does with them were read in axolotl 0.18 (067b021: `utils/schemas`,
`loaders/model.py`, `loaders/adapter.py`, `core/builders/base.py`).
"""

from __future__ import annotations

from memplan.job.foreign.keys import Keys
from memplan.job.foreign.sharding import read_deepspeed, read_fsdp
from memplan.job.foreign.training import (
    ATTENTION_HINT,
    ATTENTIONS,
    note_packing_mask,
    of_blocks,
    put_reentrant,
    put_targets,
    read_objective,
    read_run,
)
from memplan.job.parse import Block
from memplan.job.problems import listed

_HARMLESS = {
    "model_type", "tokenizer_type", "processor_type", "tokenizer_config", "base_model_ignore_patterns", "strict",
    "trust_remote_code", "resume_from_checkpoint", "auto_resume_from_checkpoints", "group_by_length", "debug",
    "remove_unused_columns", "skip_prepare_dataset", "eot_tokens", "default_system_message", "train_on_inputs",
    "shuffle_merged_datasets", "shuffle_before_merging_datasets", "push_dataset_to_hub", "hf_use_auth_token",
    "tf32", "local_rank", "ddp_timeout", "special_tokens", "pad_to_sequence_len", "pad_to_multiple_of",
    "excess_length_strategy", "min_sample_len", "eval_table_size", "eval_max_new_tokens", "metric_for_best_model",
    "greater_is_better", "load_best_model_at_end", "hub_model_id", "early_stopping_patience", "xformers",
    "lora_model_dir", "lora_fan_in_fan_out", "peft_use_rslora", "peft_init_lora_weights", "eta_min",
    "low_cpu_mem_usage",
    "cosine_min_lr_ratio", "cosine_constant_lr_ratio", "datasets", "test_datasets", "streaming", "use_tensorboard",
    "curriculum_sampling", "field_messages", "revision_of_model", "chat_template", "chat_template_jinja", "gpu",
    "experimental_skip_move_to_device", "torchdistx_path", "pretrain_multipack_attn", "full_finetune",
    "streaming_multipack_buffer_size", "eaft_alpha", "eaft_k", "cls_model_config",
    "max_packed_sequence_len", "project_name", "is_preprocess",
}  # fmt: skip
"""Keys that say nothing of what a step takes."""

_HARMLESS_PREFIXES = (
    "wandb_", "mlflow_", "comet_", "swanlab_", "use_swanlab", "trackio_", "otel_", "use_otel", "gradio_", "hub_",
    "dataset_", "dataloader_", "logging_", "save", "loss_watchdog", "loraplus_", "tokenizer_", "sample_packing_",
    "hf_", "generation_", "profiler_", "include_", "use_wandb", "use_mlflow", "is_", "merge_",
)  # fmt: skip

_OBJECTIVES = (
    "reward_model",
    "process_reward_model",
    "rl",
    "relora",
    "diffusion",
    "ebft",
    "qat",
    "num_labels",
    "use_eaft",
)
_OTHER_WEIGHTS = (
    "peft_use_dora", "lora_target_parameters", "peft_layers_pattern", "lora_exclude_modules",
    "peft_layer_replication", "lora_rank_pattern", "peft_trainable_token_indices", "unfrozen_parameters", "lora_on_cpu",
    "lisa_n_layers", "quantize_moe_experts", "model_quantization_config", "gptq", "layer_offloading", "peft",
    "llama4_linearized_experts", "reinit_weights", "freeze_mm_modules", "use_onebitllms", "shrink_embeddings",
)  # fmt: skip
_PLAIN = "memplan plans full training and plain adapters on linear layers; remove the key to plan those"
_TRUE = ("true", "yes", "on", "1")
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
_LESS = (
    "liger_rope", "liger_rms_norm", "liger_rms_norm_gated", "liger_layer_norm", "liger_swiglu", "liger_glu_activation",
    "liger_cross_entropy", "chunked_cross_entropy", "tiled_mlp", "fused_attn_kernel",
)  # fmt: skip


def read_axolotl(keys: Keys) -> None:
    """Take every key of the file."""
    keys.move("base_model", "model")
    keys.put("loop", "hf_trainer")
    keys.put("allocator.expandable_segments", True)  # utils/__init__.py sets it, unless it is set
    read_objective(keys, _OBJECTIVES)
    has_adapters = _read_adapters(keys)
    for key in _OTHER_WEIGHTS:
        keys.refuse(key, _PLAIN)
    _read_precision(keys)
    _read_batch(keys)
    _read_checkpointing(keys, has_adapters=has_adapters)
    _read_attention(keys)
    cuts = _read_kernels(keys, has_adapters=has_adapters)
    _read_tokens(keys)
    note_packing_mask(keys, str(keys.value("packing")).lower() == "true")
    read_run(keys, schedule_default="cosine", epochs_default=1)
    _read_evaluation(keys)
    _read_devices(keys)
    if not cuts:  # cut cross-entropy needs them in 16 bits
        _refuse_float32_embeddings(keys)
    keys.leave(_HARMLESS, _HARMLESS_PREFIXES)


def _read_adapters(keys: Keys) -> bool:
    """The method; whether adapters are what trains."""
    adapter = (keys.text("adapter") or "full").lower()
    line = keys.line("load_in_4bit")
    in_4bit, in_8bit = keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    if adapter not in ("full", "lora", "qlora"):
        keys.gap(
            f"`adapter: {adapter}` is not planned",
            "`--set method=lora`, `qlora` or `full` plans those",
            field="method",
        )
        return True
    has_8_bits = in_8bit and not in_4bit and adapter == "lora"
    if not has_8_bits and (in_8bit or in_4bit != (adapter == "qlora")):
        bits = 8 if in_8bit else 4 if in_4bit else 16
        keys.gap(
            f"a base in {bits} bits with `adapter: {adapter}` is not planned",
            "`--set method=qlora` plans 4 bits, `lora` 16",
            line=line,
            field="method",
        )
    keys.put("method", "qlora" if has_8_bits else adapter, "adapter")
    if adapter == "full":
        keys.leave((), ("lora_",))
        return False
    keys.put("quantization.double_quant", True)
    keys.put("quantization.storage", "bfloat16")
    options = keys.section("bnb_config_kwargs")
    options.move("bnb_4bit_use_double_quant", "quantization.double_quant")
    options.move("bnb_4bit_quant_type", "quantization.type")
    options.move("bnb_4bit_quant_storage", "quantization.storage")
    if has_8_bits:
        keys.put("quantization.type", "int8", "load_in_8bit")
    keys.move("lora_r", "lora.rank")
    keys.move("lora_alpha", "lora.alpha")
    keys.move("lora_dropout", "lora.dropout", 0.0)
    keys.move("lora_modules_to_save", "lora.modules_to_save")
    keys.put("lora.dtype", "float32" if keys.flag("peft_autocast_adapter_dtype", True) else "bfloat16")
    _read_targets(keys)
    return True


def _read_targets(keys: Keys) -> None:
    line = keys.line("lora_target_modules")
    names = keys.take("lora_target_modules")
    layers_line, layers = keys.line("peft_layers_to_transform"), keys.take("peft_layers_to_transform")
    if layers is not None:
        plain = isinstance(names, list) and not keys.flag("lora_target_linear")
        if plain and isinstance(layers, list) and all(str(layer).isdigit() for layer in layers):
            names = of_blocks(names, layers)
        else:
            hint = "it is planned beside a list of `lora_target_modules`"
            keys.gap("`peft_layers_to_transform` is not planned here", hint, line=layers_line)
    if keys.flag("lora_target_linear"):
        keys.put("lora.target_modules", "all-linear", "lora_target_linear")
    elif names is not None:
        put_targets(keys, names, line)
    else:
        hint = "name the layers: `--set lora.target_modules=[q_proj,v_proj]`, or `all-linear`"
        keys.gap(
            "`lora_target_modules` is missing, so that peft finds no layer", hint, field="lora.target_modules"
        )


def _read_precision(keys: Keys) -> None:
    """`bf16: full` alone is without autocast: `bfloat16` reaches the Trainer as `bf16` (core/builders/base.py)."""
    bf16 = (keys.text("bf16") or "auto").lower()
    mixed16, bfloat16, pure_fp16 = keys.flag("fp16"), keys.flag("bfloat16"), keys.flag("float16")
    keys.leave(("float32", "torch_dtype"))
    if bf16 == "auto" and not mixed16:
        keys.note("`bf16: auto` is taken as `true`, as on every GPU since Ampere")
    if bf16 == "full":
        keys.put("dtype", "bfloat16", "bf16")
    elif bf16 in _TRUE or (bf16 == "auto" and not mixed16) or (bfloat16 and not mixed16):
        keys.put("dtype", "bfloat16", "bf16")
        keys.put("autocast", "bfloat16", "bf16")
    elif mixed16:
        keys.put("dtype", "bfloat16" if bfloat16 else "float16", "fp16")
        keys.put("autocast", "float16", "fp16")
    else:
        in_16_bits = pure_fp16 or keys.value("quantization.type") == "int8"  # utils/config, resolve_dtype
        keys.put("dtype", "float16" if in_16_bits else "float32")
    keys.refuse("fp8", "memplan plans 16-bit products; remove the key to plan those")
    keys.leave(("fp8_enable_fsdp_float8_all_gather",))


def _refuse_float32_embeddings(keys: Keys) -> None:
    """Full training without FSDP: what flash attention needs in 16 bits stays in 32 without it (loaders/model.py)."""
    sharded = keys.value("parallel.strategy") not in (None, "NO_SHARD")
    attention, dtype = keys.value("attention"), keys.value("dtype")
    if keys.value("method") != "full" or sharded or dtype == "float32" or attention not in ("sdpa", "eager"):
        return
    keys.gap(
        f"axolotl keeps embeddings, norms and head in float32 with `{attention}` attention, which is not planned",
        f"`--set attention=flash_attention_2` plans flash attention, with which they are {dtype}; "
        f"`--set attention={attention}` plans them in {dtype} all the same",
        field="attention",
    )


def _read_tokens(keys: Keys) -> None:
    """Added tokens grow the embeddings; beside adapters they stay frozen."""
    line, tokens = keys.line("tokens"), keys.take("tokens")
    if isinstance(tokens, list):
        keys.put("data.special_tokens", tokens, "tokens", line)
        keys.put("lora.train_tokens", False)
    if keys.flag("resize_token_embeddings_to_32x"):
        keys.put("data.vocab_multiple", 32, "resize_token_embeddings_to_32x")
    keys.leave(("added_tokens_overrides", "mean_resizing_embeddings", "embeddings_skip_upcast"))


def _read_batch(keys: Keys) -> None:
    size = keys.whole("micro_batch_size", 1)
    keys.put("micro_batch_size", size, "micro_batch_size")
    steps = max(1, keys.whole("batch_size", size) // size)
    keys.move("gradient_accumulation_steps", "gradient_accumulation_steps", steps)
    keys.move("sequence_len", "max_seq_len", 512)
    keys.move("sample_packing", "packing", "pretraining_dataset" in keys)
    keys.take("pretraining_dataset")


def _read_checkpointing(keys: Keys, *, has_adapters: bool) -> None:
    line = keys.line("gradient_checkpointing")
    word = (keys.text("gradient_checkpointing") or "false").lower()
    offload = (keys.text("activation_offloading") or "false").lower()
    options = keys.section("gradient_checkpointing_kwargs")
    is_reentrant = options.flag("use_reentrant", True)  # utils/config, normalize_config
    if word in ("offload", "offload_disk") or offload not in ("false", "hidden_states"):
        _read_offload(keys, offload, line, beside_reentrant=has_adapters and is_reentrant)
        return
    keys.put("activation_checkpointing", word, "gradient_checkpointing", line)
    keys.put("activation_offload", offload == "hidden_states", "activation_offloading")
    put_reentrant(keys, is_reentrant)
    keys.refuse("selective_checkpointing", "`--set activation_checkpointing=full` plans that of whole blocks")


def _read_offload(keys: Keys, offload: str, line: int | None, *, beside_reentrant: bool) -> None:
    """
    Offload of all activations, by TRL's context manager, with streams but for `legacy`. Blocks are checkpointed too:
    axolotl wraps them for full fine-tuning, and has switched that on in the model where there are adapters
    (loaders/model.py, _apply_activation_checkpointing, _configure_embedding_dtypes).
    """
    keys.put("activation_checkpointing", "full", "gradient_checkpointing", line)
    if beside_reentrant:
        keys.gap(
            "axolotl's offload of all activations beside re-entrant checkpointing, its default, is not planned",
            "`gradient_checkpointing_kwargs: {use_reentrant: false}` in the file is; `--set offload.activations=none` "
            "plans checkpointing alone",
            line=line,
            field="offload.activations",
        )
        return
    mode = "synchronous" if offload == "legacy" else "streams"
    keys.put("offload.activations", mode, "activation_offloading", line)


def _read_attention(keys: Keys) -> None:
    switches = {
        "flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager",
        "xformers_attention": "xformers", "flex_attention": "flex_attention", "sage_attention": "sage",
    }  # fmt: skip
    chosen = [name for key, name in switches.items() if keys.flag(key)]
    line = keys.line("attn_implementation")
    word = keys.text("attn_implementation") or (chosen[0] if chosen else "sdpa")
    if word in ATTENTIONS:
        keys.put("attention", ATTENTIONS[word], "attn_implementation", line)
        return
    keys.gap(f"attention by `{word}` is not planned", ATTENTION_HINT, line=line, field="attention")


def _read_kernels(keys: Keys, *, has_adapters: bool) -> bool:
    """The head's loss, and what is named of other kernels; whether it is cut cross-entropy."""
    plugins = keys.take("plugins") or []
    names = [str(name).rpartition(".")[2] for name in (plugins if isinstance(plugins, list) else [plugins])]
    fused = keys.flag("liger_fused_linear_cross_entropy")
    cut = keys.flag("cut_cross_entropy", "CutCrossEntropyPlugin" in names)
    keys.put("loss", "fused" if fused or cut else "full", "plugins" if fused or cut else None)
    if cut:
        keys.note(
            "cut cross-entropy is planned as Liger's fused head and loss, which does not hold the logits either"
        )
    own_code = keys.flag("trust_remote_code")  # of which it knows no layers to put kernels in
    in_8_bits = keys.value("quantization.type") == "int8"
    by_default = has_adapters and not (own_code or in_8_bits or any(key in keys for key in _KERNELS))
    above = [key for key in (*_LESS, *_KERNELS) if keys.flag(key, by_default and key in _KERNELS)]
    gates = {"liger_swiglu", "liger_glu_activation"}
    if {"liger_rope", "liger_rms_norm"} <= set(above) and gates & set(above):
        keys.put("kernels", "liger", "plugins")
        above = [
            key for key in above if key not in ("liger_rope", "liger_rms_norm", "liger_layer_norm", *gates)
        ]
    if above:
        note = f"these kernels hold less than what is planned in their place: {listed(above, 'and')}"
        keys.note(f"{note}, the last four on by default" if by_default else note)
    others = [name for name in names if name not in ("LigerPlugin", "CutCrossEntropyPlugin")]
    if others:
        keys.note(f"plugins are not planned: {listed(others, 'and')}")
    if keys.flag("torch_compile"):
        keys.note("`torch_compile` is not planned: the step is planned as it runs without")
    keys.leave(
        (), ("torch_compile_", "liger_", "chunked_cross_entropy_", "tiled_mlp_", "flash_attn_", "cut_cross")
    )
    return cut


def _read_evaluation(keys: Keys) -> None:
    runs = keys.number("val_set_size", 0) > 0 or "test_datasets" in keys
    keys.leave((), ("eval", "do_", "bench_"))
    if runs:
        keys.note(
            "evaluation (`val_set_size`) is not planned: it runs with the same batch, without gradients"
        )


def _read_devices(keys: Keys) -> None:
    for key, field in (
        ("dp_shard_size", "parallel.dp_shard"),
        ("dp_replicate_size", "parallel.dp_replicate"),
    ):
        keys.move(key, field)
    for key in ("tensor_parallel_size", "context_parallel_size", "expert_parallel_size"):
        keys.refuse(key, "`dp_shard_size` and `dp_replicate_size` are planned", harmless=("1",))
    keys.leave(
        ("ddp", "ddp_find_unused_parameters", "fsdp_final_state_dict_type", "world_size", "use_ray"),
        ("ray_",),
    )
    for key in ("device_map", "max_memory", "gpu_memory_limit"):
        keys.refuse(
            key,
            "memplan plans a model that is whole on its GPU, or sharded by FSDP or ZeRO",
            harmless=("auto",),
        )
    version = keys.text("fsdp_version")
    sharded = keys.take("fsdp")
    config = keys.section("fsdp_config")
    if sharded or not config.is_empty or version:
        read_fsdp(keys, config, version=version, words=sharded, default_version="1")
        if keys.value("parallel.strategy") == "FULL_SHARD" and keys.value("parallel.dp_replicate") not in (
            None,
            "1",
        ):
            keys.put("parallel.strategy", "HYBRID_SHARD", "dp_replicate_size")
    if "deepspeed" in keys:
        line = keys.line("deepspeed")
        given = keys.take("deepspeed")
        read_deepspeed(keys, given if isinstance(given, Block) else str(given), line)
