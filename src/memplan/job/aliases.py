"""
Names and values of other tools that mean the same as ours, accepted on input.

Sources, each read in its own option classes: transformers `TrainingArguments` and `BitsAndBytesConfig`, TRL
`SFTConfig` and `ModelConfig`, peft `LoraConfig`, axolotl `utils/schemas`, LLaMA-Factory `hparams`, litgpt
`args.py`, torchtune recipes, torchtitan `ParallelDims`, accelerate and DeepSpeed config files. What only
resembles ours is not an alias: it is refused with the reason (`REMEDIES`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from memplan.job.fields import job_fields
from memplan.job.problems import Invalid, listed, shorten


class Not(NamedTuple):
    """What `bf16: false` says of `autocast`: anything but this value."""

    value: Any
    unless: tuple[str, Any] | None = None
    """Another field and its value, with which the first may have this value."""


class Alias(NamedTuple):
    """
    Another tool's name for `field`; its values mean what `words` says, where that is given: a value, or of several
    fields.
    """

    field: str
    words: dict[str, Any] | None = None


_DTYPE_WORDS: dict[str, Any] = {
    "bf16": "bfloat16", "torch.bfloat16": "bfloat16",
    "fp16": "float16", "half": "float16", "torch.float16": "float16",
    "fp32": "float32", "float": "float32", "torch.float32": "float32",
}  # fmt: skip

FIELD_WORDS: dict[str, dict[str, Any]] = {
    "dtype": _DTYPE_WORDS,
    "lora.dtype": _DTYPE_WORDS,
    "autocast": _DTYPE_WORDS,
    "activation_checkpointing": {
        "true": "full", "false": "none",
        "offload": {"activation_checkpointing": "full", "activation_offload": True},
    },
    "attention": {"fa2": "flash_attention_2"},
    "optimizer": {
        "adamw_torch": {"optimizer": "adamw", "optimizer_kernel": "foreach"},
        "adamw_torch_fused": {"optimizer": "adamw", "optimizer_kernel": "fused"},
        "adamw_bnb_8bit": "adamw_8bit",
        "adamw_torch_8bit": "ao_adamw_8bit",
        "adamw_torch_4bit": "ao_adamw_4bit",
        "paged_adamw_32bit": "paged_adamw",
        "lion_32bit": "lion",
    },
    "lora.target_modules": {"all": "all-linear"},
    "train.schedule": {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine"},
    "parallel.backward_prefetch": {
        word.lower(): word for word in ("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH")
    },
    "kernels": {"true": {"kernels": "liger", "loss": "fused"}, "false": "torch"},
    "parallel.strategy": {
        "ddp": "NO_SHARD", "no_shard": "NO_SHARD", "shard_grad_op": "SHARD_GRAD_OP",
        "full_shard": "FULL_SHARD", "hybrid_shard": "HYBRID_SHARD",
        "zero1": "ZERO_1", "zero2": "ZERO_2", "zero3": "ZERO_3",
    },
}  # fmt: skip
"""Values of other tools, by field. A value that is a mapping sets several fields."""

_SAME = {
    "model": ("model_name_or_path", "base_model", "model_name", "pretrained_model_name_or_path"),
    "dtype": ("torch_dtype",),
    "micro_batch_size": (
        "per_device_train_batch_size", "train_micro_batch_size_per_gpu", "device_batch_size",
        "local_batch_size",
    ),
    "gradient_accumulation_steps": ("gradient_accumulation_iters", "grad_accum"),
    "max_seq_len": (
        "max_length", "max_seq_length", "sequence_len", "cutoff_len", "model_max_length", "seq_len",
    ),
    "packing": ("sample_packing",),
    "activation_checkpointing": ("gradient_checkpointing", "enable_activation_checkpointing"),
    "activation_offload": ("activation_offloading", "enable_activation_offloading"),
    "attention": ("attn_implementation",),
    "kernels": ("use_liger_kernel", "enable_liger_kernel"),
    "optimizer": ("optim",),
    "lora.rank": ("lora_r", "lora_rank", "lora.r", "lora.lora_r", "lora.lora_rank"),
    "lora.alpha": ("lora_alpha", "lora.lora_alpha"),
    "lora.dropout": ("lora_dropout", "lora.lora_dropout"),
    "lora.target_modules": (
        "lora_target_modules", "lora_target", "target_modules",
        "lora.lora_target_modules", "lora.lora_target",
    ),
    "lora.modules_to_save": (
        "modules_to_save", "lora_modules_to_save", "additional_target",
        "lora.lora_modules_to_save", "lora.additional_target",
    ),
    "npt.layers": ("npt_layers",),
    "npt.rank": ("np_rank", "npt_rank"),
    "quantization.type": (
        "bnb_4bit_quant_type", "quantization_type",
        "quantization.bnb_4bit_quant_type", "quantization.quant_type",
    ),
    "quantization.double_quant": (
        "bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization",
        "quantization.bnb_4bit_use_double_quant", "quantization.use_double_quant",
    ),
    "quantization.storage": (
        "bnb_4bit_quant_storage",
        "quantization.bnb_4bit_quant_storage", "quantization.quant_storage",
    ),
    "quantization.skip": ("llm_int8_skip_modules",),
    "parallel.strategy": ("sharding_strategy", "fsdp_sharding_strategy"),
    "parallel.dp_shard": ("dp_shard_size", "data_parallel_shard_degree"),
    "parallel.dp_replicate": ("dp_replicate_size", "data_parallel_replicate_degree"),
    "parallel.tp": ("tensor_parallel_size", "tensor_parallel_degree"),
    "parallel.pp": ("pipeline_parallel_size", "pipeline_parallel_degree"),
    "parallel.cp": ("context_parallel_size", "context_parallel_degree"),
    "parallel.ep": ("expert_parallel_size", "expert_parallel_degree"),
    "parallel.fsdp_version": ("fsdp_version",),
    "parallel.backward_prefetch": ("backward_prefetch", "fsdp_backward_prefetch"),
    "offload.params": ("offload_params", "fsdp_cpu_offload", "fsdp_offload_params"),
    "load.ram_efficient": ("cpu_ram_efficient_loading", "fsdp_cpu_ram_efficient_loading"),
    "data.train": ("dataset_name", "train_file"),
    "data.eval": ("validation_file",),
    "data.split": ("dataset_train_split",),
    "data.subset": ("dataset_config", "dataset_config_name"),
    "data.text": ("dataset_text_field",),
    "data.messages": ("field_messages", "data.field_messages"),
    "data.chat_template": ("chat_template_path",),
    "data.special_tokens": (
        "tokens", "special_tokens", "add_tokens", "add_special_tokens", "new_special_tokens",
    ),
    "train.max_steps": ("max_steps", "train.steps"),
    "train.epochs": ("num_train_epochs", "num_epochs", "epochs", "train.num_train_epochs"),
    "train.learning_rate": ("learning_rate", "lr", "train.lr"),
    "train.warmup_steps": ("warmup_steps", "num_warmup_steps", "lr_warmup_steps"),
    "train.warmup_ratio": ("warmup_ratio",),
    "train.min_learning_rate": ("min_lr", "train.min_lr"),
    "train.schedule": ("lr_scheduler_type", "lr_scheduler", "train.lr_scheduler_type"),
    "train.weight_decay": ("weight_decay",),
    "train.beta1": ("adam_beta1", "train.adam_beta1"),
    "train.beta2": ("adam_beta2", "train.adam_beta2"),
    "train.epsilon": ("adam_epsilon", "train.adam_epsilon", "train.eps"),
    "train.max_grad_norm": ("max_grad_norm", "gradient_clipping"),
    "train.save_every": ("save_steps", "train.save_steps"),
    "train.keep_checkpoints": ("save_total_limit", "train.save_total_limit"),
    "train.eval_every": ("eval_steps", "train.eval_steps"),
    "train.early_stopping": ("early_stopping_patience", "train.early_stopping_patience"),
    "train.output_dir": ("output_dir",),
    "train.report_to": ("report_to",),
    "train.seed": ("seed",),
}  # fmt: skip

_IN_8_BITS = ("quantization.type", "int8")
_FOUR_BITS = {"method": "qlora", "quantization.type": Not("int8")}
_EIGHT_BITS = {"method": "qlora", "quantization.type": "int8"}

ALIASES: dict[str, Alias] = {
    **{name: Alias(field) for field, names in _SAME.items() for name in names},
    "load_in_4bit": Alias("method", {"true": _FOUR_BITS, "false": Not("qlora", unless=_IN_8_BITS)}),
    "load_in_8bit": Alias("method", {"true": _EIGHT_BITS, "false": {"quantization.type": Not("int8")}}),
    "quantization_bit": Alias("method", {"4": _FOUR_BITS, "8": _EIGHT_BITS, "null": Not("qlora")}),
    "adapter": Alias("method", {"lora": "lora", "qlora": "qlora", "null": "full"}),
    "finetuning_type": Alias("method", {"full": "full", "lora": Not("full")}),
    "bf16": Alias("autocast", {"true": "bfloat16", "false": Not("bfloat16")}),
    "fp16": Alias("autocast", {"true": "float16", "false": Not("float16")}),
    "mixed_precision": Alias("autocast", {"bf16": "bfloat16", "fp16": "float16", "no": None}),
    "train_on_inputs": Alias("data.mask", {"true": "none", "false": "prompt"}),
    "train_on_prompt": Alias("data.mask", {"true": "none", "false": "prompt"}),
    "mask_history": Alias("data.mask", {"true": "history", "false": Not("history")}),
    "completion_only_loss": Alias("data.mask", {"true": "prompt", "false": "none"}),
    "assistant_only_loss": Alias("data.mask", {"true": "prompt", "false": "none"}),
    "flash_attention": Alias("attention", {"true": "flash_attention_2", "false": Not("flash_attention_2")}),
    "resize_token_embeddings_to_32x": Alias("data.vocab_multiple", {"true": 32, "false": 1}),
    "lora_target_linear": Alias("lora.target_modules", {"true": "all-linear", "false": Not("all-linear")}),
}
"""Other tools' names. That of a section's field is also known inside the section: `train: {lr: 1.0e-4}`."""

_GLOBAL_BATCH = (
    "set `micro_batch_size` and `gradient_accumulation_steps`; the global batch is their product times the "
    "data-parallel degrees"
)
_STRATEGY = "set `parallel.strategy`, `parallel.dp_shard`, `parallel.fsdp_version` and `offload` instead"
_ROWS = "name added tokens with `data.special_tokens`: their rows train beside adapters, no other ones"

REMEDIES: dict[str, str] = {
    "batch_size": "set `micro_batch_size`, the sequences per device in one forward pass",
    "global_batch_size": _GLOBAL_BATCH,
    "train_batch_size": _GLOBAL_BATCH,
    "total_batch_size": _GLOBAL_BATCH,
    "per_device_eval_batch_size": "remove it: evaluation runs with `micro_batch_size`",
    "eval_batch_size": "remove it: evaluation runs with `micro_batch_size`",
    "dataset": "name the training data with `data.train`",
    "datasets": "name the training data with `data.train`",
    "deepspeed": _STRATEGY,
    "fsdp": _STRATEGY,
    "fsdp_config": _STRATEGY,
    "bnb_4bit_compute_dtype": "4-bit layers compute in `dtype`, or in `autocast` where it is set",
    "resize_vocab": "remove it: embeddings grow where `data.special_tokens` have no room",
    "trainable_token_indices": _ROWS,
    "use_cache": "remove it: training never keeps a key-value cache",
    "world_size": "set `parallel.dp_shard` and `parallel.dp_replicate`; their product is the number of GPUs",
    "num_gpus": "set `parallel.dp_shard` and `parallel.dp_replicate`; their product is the number of GPUs",
    "<<": "write the fields out; YAML merge keys are not read in a job",
}
"""Names of other tools that we know and do not take, with what to write instead."""

_BOOL_WORDS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def translate(key: str, value: Any) -> tuple[dict[str, Any], bool]:
    """
    What a written `key: value` sets, {field: value or `Not`}, and whether it was in another tool's words.

    >>> translate("optim", "adamw_torch")
    ({'optimizer': 'adamw', 'optimizer_kernel': 'foreach'}, True)

    Raises:
        KeyError: no field or alias is called that.
        Invalid: the alias is known and the value is not.
    """
    field, words = _look_up(key)
    renamed = field != key
    if words is not None:
        word = _word(value, words)
        if word not in words:
            known = listed([name for name in words if name != "null"])
            raise Invalid(f"cannot be `{shorten(value)}`", hint=f"write {known}, or set `{field}`")
        meant = words[word]
        return (dict(meant) if isinstance(meant, dict) else {field: meant}), True
    translations = FIELD_WORDS.get(field, {})
    word = _word(value, translations)
    if word not in translations or value in (job_fields()[field].choices or ()):
        return {field: value}, renamed
    meant = translations[word]
    return (dict(meant) if isinstance(meant, dict) else {field: meant}), True


def _look_up(key: str) -> tuple[str, dict[str, Any] | None]:
    if key in job_fields():
        return key, None
    if key in ALIASES:
        return ALIASES[key]
    section, _, rest = key.partition(".")
    alias = ALIASES.get(rest)
    if alias is None or not alias.field.startswith(f"{section}."):
        raise KeyError(key)
    return alias


def _word(value: Any, words: dict[str, Any]) -> str | None:
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return None
    word = str(value).lower()
    return word if word in words else _BOOL_WORDS.get(word, word)
