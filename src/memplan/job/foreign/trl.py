"""
A config of `trl sft`. Its defaults and what it does with them were read in TRL 1.16 (`scripts/sft.py`,
`trainer/sft_config.py`, `trainer/sft_trainer.py`, `trainer/model_config.py`); what it leaves to TrainingArguments is
transformers 5's.
"""

from __future__ import annotations

from memplan.errors import JobError
from memplan.job.foreign.accelerate import launched, read_launch, read_shipped
from memplan.job.foreign.keys import Keys
from memplan.job.foreign.sharding import read_deepspeed, read_fsdp
from memplan.job.foreign.training import (
    ATTENTION_HINT,
    ATTENTIONS,
    put_reentrant,
    put_targets,
    read_evaluation,
    read_run,
)
from memplan.job.parse import Block

_HARMLESS = {
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming", "datasets",
    "streaming", "test_split_size", "dataset_text_field", "dataset_num_proc", "dataset_kwargs", "eos_token",
    "pad_token",
    "chat_template_path", "truncation_mode", "shuffle_dataset", "eval_packing",
    "completion_only_loss", "assistant_only_loss", "trust_remote_code", "model_revision",
    "lora_task_type", "use_rslora", "report_to", "run_name", "push_to_hub", "remove_unused_columns", "ddp_timeout",
    "resume_from_checkpoint", "disable_tqdm", "tf32", "ignore_bias_buffers", "project", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "group_by_length", "overwrite_output_dir", "do_train", "do_eval",
    "config", "include_num_input_tokens_seen", "router_aux_loss_coef", "trackio_space_id",
    "ddp_find_unused_parameters", "dataset_split", "train_sampling_strategy", "logging_strategy",
}  # fmt: skip
"""Keys that say nothing of what a step takes."""

_HARMLESS_PREFIXES = ("dataloader_", "logging_", "save", "hub_", "trackio_")

_OTHER_MODELS = ("use_dora", "lora_target_parameters", "model_init_kwargs")


def read_trl(keys: Keys) -> None:
    """Take every key of the file."""
    keys.move("model_name_or_path", "model")
    keys.put("loop", "hf_trainer")
    keys.put("allocator.expandable_segments", False)
    for key in _OTHER_MODELS:
        keys.refuse(key, "memplan plans full training and plain adapters; remove the key to plan those")
    _read_method(keys)
    fp16 = keys.flag("fp16")
    mixed = "float16" if fp16 else "bfloat16" if keys.flag("bf16", True) else None
    keys.put("autocast", mixed, "fp16" if fp16 else None)
    keys.move("per_device_train_batch_size", "micro_batch_size", 8)
    keys.move("gradient_accumulation_steps", "gradient_accumulation_steps", 1)
    _read_rows(keys)
    _read_checkpointing(keys)
    keys.choose("attn_implementation", "attention", ATTENTIONS, "sdpa", hint=ATTENTION_HINT)
    _read_loss(keys)
    read_run(keys, schedule_default="linear", epochs_default=3, learning_rate_default=2e-5)
    read_evaluation(keys)
    _read_environment(keys)
    _read_devices(keys, mixed)
    keys.leave(_HARMLESS, _HARMLESS_PREFIXES)


def _read_rows(keys: Keys) -> None:
    """Rows of `max_length`, or a batch in one row, whose documents are kept apart: packed, or padding-free."""
    line = keys.line("max_length")
    if keys.is_null("max_length"):
        hint = "name the longest sample: `--set max_seq_len=8192`"
        keys.gap(
            "`max_length: null` cuts nothing, and how long a row is the file does not say",
            hint,
            field="max_seq_len",
        )
    length, multiple = keys.whole("max_length", 1024), keys.whole("pad_to_multiple_of", 1)
    rows = -(-length // multiple) * multiple
    keys.put("max_seq_len", rows, "max_length" if line else None, line)
    key = "packing" if "packing" in keys else None
    packs = keys.flag("packing")
    keys.put("packing", packs, key)
    by_document = (keys.text("packing_strategy") or "bfd") != "wrapped"
    key = "padding_free" if "padding_free" in keys else key
    keys.put("padding_free", keys.flag("padding_free") or (packs and by_document), key)


def _read_method(keys: Keys) -> None:
    has_adapters, in_4bit, in_8bit = (keys.flag(key) for key in ("use_peft", "load_in_4bit", "load_in_8bit"))
    is_quantized = in_4bit or in_8bit
    if is_quantized and not has_adapters:
        key = "load_in_4bit" if in_4bit else "load_in_8bit"
        keys.gap(f"`{key}` without `use_peft: true` trains nothing", "set `use_peft: true`", field="method")
    method = ("qlora" if is_quantized else "lora") if has_adapters else "full"
    keys.put("method", method, "use_peft" if has_adapters else None)
    keys.move("dtype", "dtype", "float32")
    keys.move("use_bnb_nested_quant", "quantization.double_quant", False)
    keys.move("bnb_4bit_quant_type", "quantization.type", "nf4")
    keys.move("bnb_4bit_quant_storage", "quantization.storage", "uint8")
    if in_8bit and not in_4bit:  # trainer/utils.py, get_quantization_config
        keys.put("quantization.type", "int8", "load_in_8bit")
    if has_adapters:
        keys.move("lora_r", "lora.rank", 16)
        keys.move("lora_alpha", "lora.alpha", 32)
        keys.move("lora_dropout", "lora.dropout", 0.05)
        keys.move("lora_modules_to_save", "lora.modules_to_save")
        if is_quantized:
            keys.put("lora.modules_to_save_dtype", "bfloat16")  # as the adapters
        keys.put("lora.dtype", "bfloat16" if is_quantized else "float32")
        if "lora_target_modules" in keys:
            line, names = keys.line("lora_target_modules"), keys.take("lora_target_modules")
            is_one = isinstance(names, list) and len(names) == 1  # ModelConfig takes it out of its list
            put_targets(keys, names[0] if is_one else names, line)
        else:
            hint = "name the layers: `--set lora.target_modules=[q_proj,v_proj]`, or `all-linear`"
            keys.gap("peft chooses the layers that get an adapter", hint, field="lora.target_modules")
    keys.leave((), ("lora_",))


def _read_checkpointing(keys: Keys) -> None:
    key = "activation_checkpointing" if "activation_checkpointing" in keys else "gradient_checkpointing"
    keys.move(key, "activation_checkpointing", "full")
    is_reentrant = keys.section(f"{key}_kwargs").flag("use_reentrant")
    put_reentrant(keys, is_reentrant)
    if not keys.flag("activation_offloading"):
        return
    if is_reentrant and keys.value("activation_checkpointing") not in ("none", None):
        keys.gap(
            "TRL's offload of all activations beside re-entrant checkpointing is not planned",
            "`use_reentrant: false` in the file is; `--set offload.activations=none` plans checkpointing alone",
            field="offload.activations",
        )
    else:
        keys.put("offload.activations", "streams", "activation_offloading")


def _read_loss(keys: Keys) -> None:
    """Its own head and loss whatever is asked for: Liger's are switched off for it."""
    kind = keys.text("loss_type")
    if kind in (None, "nll", "chunked_nll", "dft"):
        keys.put("loss", "chunked", "loss_type" if kind else None)
    else:
        keys.gap(f"`loss_type: {kind}` is not planned", "`--set loss=chunked` plans `nll`", field="loss")
    if keys.flag("use_liger_kernel"):
        keys.put("kernels", "liger", "use_liger_kernel")
    if keys.flag("torch_compile"):
        keys.note("`torch_compile` is not planned: the step is planned as it runs without")


def _read_devices(keys: Keys, mixed: str | None) -> None:
    """`trl sft` hands what it does not know itself to `accelerate launch`, over the settings that are named."""
    line = keys.line("accelerate_config")
    named = keys.text("accelerate_config")
    sharded, config = keys.take("fsdp"), keys.section("fsdp_config")
    own = bool(sharded) and str(sharded).lower() != "false"
    if own:  # without it TrainingArguments pass over `fsdp_config`
        read_fsdp(keys, config, version=None, words=sharded, default_version="2")
    if "deepspeed" in keys:
        place, given = keys.line("deepspeed"), keys.take("deepspeed")
        read_deepspeed(keys, given if isinstance(given, Block) else str(given), place)
    more = {
        key: value
        for key in ("num_processes", "num_machines", "mixed_precision")
        if (value := keys.text(key))
    }
    if named is not None:
        try:
            launch = read_shipped(named, keys, more) or read_launch(named, more)
        except JobError as error:
            hint = "`--accelerate FILE` reads one from elsewhere, `--set parallel.strategy=FULL_SHARD` plans FSDP2"
            keys.gap(error.message, hint, line=line, field="parallel.strategy")
            return
        launched(launch, {setting.field for setting in keys.settings}, mixed)
        keys.add(launch)
    elif "num_processes" in more:
        shards = keys.value("parallel.strategy") is not None
        keys.put(
            f"parallel.{'dp_shard' if shards else 'dp_replicate'}", more["num_processes"], "num_processes"
        )


def _read_environment(keys: Keys) -> None:
    environment = keys.section("env")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:True" in (environment.text(name) or ""):
            keys.put("allocator.expandable_segments", True, "env")
