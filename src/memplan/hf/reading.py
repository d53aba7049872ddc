"""
What a Trainer's objects say, as fields of a job: arguments, model, adapters, quantization. What a job has no words for
is listed, never left out in silence.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from memplan.errors import JobError
from memplan.job.sections import STORAGES
from memplan.job.spec import AllocatorSettings, Job
from memplan.model.config import has_other_head
from memplan.model.stored import of_single_blocks

_OVERRIDDEN = (
    "compute_loss", "training_step", "create_optimizer", "get_batch_samples", "_prepare_inputs", "_clip_grad_norm",
    "_inner_training_loop", "_run_epoch",
)  # fmt: skip
"""Methods of transformers' Trainer that decide what a step takes."""

_KERNELS = {"sgd": "foreach", "adamw_torch": "foreach"}
"""Of torch's optimizers when nothing else is asked for; on the CPU torch steps in a loop."""

_AUTOCAST = {"no": None, "bf16": "bfloat16", "fp16": "float16"}
"""accelerate's words for mixed precision."""

_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "bias": ("none",), "ensure_weight_tying": (False, None), "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}), "layers_to_transform": (None, []), "target_parameters": (None, []),
    "trainable_token_indices": (None, []), "layer_replication": (None, []), "lora_bias": (False, None),
    "exclude_modules": (None, []), "use_qalora": (False, None),
    "arrow_config": (None,), "corda_config": (None,), "megatron_config": (None, {}),
}  # fmt: skip
"""Settings of peft's LoraConfig with the values that a job's plain adapters mean."""

_SEEN = ("layers_to_transform", "exclude_modules")
"""Those that a model with adapters shows by the layers that have one."""


@dataclass
class Reading:
    """Fields of a job in its own or TrainingArguments' words, and what else there is."""

    fields: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    """What a job cannot say: the plan from the job alone would be of something else."""
    notes: list[str] = field(default_factory=list)
    has_flat_parameters: bool = False
    """FSDP1 without `use_orig_params`."""
    finds_unused: bool | None = None
    """What DDP is told of unused parameters; None: the Trainer's default."""

    def job(self, gpu: str | None = None) -> Job:
        """
        The job that the fields make.

        Raises:
            JobError: a value is not one that a job can have.
        """
        from memplan.job.load import load_job

        return load_job(None, flags=self.fields | {"loop": "hf_trainer", "gpu": gpu}).job


def read_arguments(reading: Reading, args: Any, *, device: str) -> None:
    """TrainingArguments, or a subclass such as SFTConfig."""
    optimizer = getattr(args.optim, "value", args.optim)
    reading.fields |= {
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "optim": optimizer,
        "weight_decay": args.weight_decay,
        "autocast": _AUTOCAST.get(_mixed_precision(args)),
    }
    if _mixed_precision(args) not in _AUTOCAST:
        reading.unknown.append(f"mixed precision in {_mixed_precision(args)}")
    if args.max_grad_norm:
        reading.fields["max_grad_norm"] = args.max_grad_norm
    if optimizer in _KERNELS:
        reading.fields["optimizer_kernel"] = _KERNELS[optimizer] if device == "cuda" else "loop"
        if optimizer == "adamw_torch":
            reading.fields["optim"] = "adamw"
    if optimizer == "adafactor":
        reading.unknown.append("transformers' own Adafactor")
    _read_checkpointing(reading, args)
    switches = {
        "optim_args": "`optim_args`", "label_smoothing_factor": "`label_smoothing_factor`",
        "neftune_noise_alpha": "`neftune_noise_alpha`", "torch_compile": "`torch_compile`",
        "deepspeed": "DeepSpeed",
        "activation_offloading": "`activation_offloading`", "optim_target_modules": "`optim_target_modules`",
    }  # fmt: skip
    reading.unknown += [words for name, words in switches.items() if getattr(args, name, None)]
    if getattr(args, "n_gpu", 1) > 1:
        reading.unknown.append("nn.DataParallel")
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        reading.notes.append("evaluation is not planned")
    if getattr(args, "torch_compile", False):
        reading.notes.append("`torch_compile` is left out: traced as it runs without")
    if getattr(args, "torch_empty_cache_steps", None):
        reading.notes.append(
            "`torch_empty_cache_steps` is left out: it gives cached memory back now and then"
        )
    if getattr(args, "auto_find_batch_size", False):
        reading.notes.append("`auto_find_batch_size` may run with less than this batch")


def _mixed_precision(args: Any) -> str:
    """Also that which `accelerate launch` asks for: it holds where the arguments say nothing."""
    asked = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
    return str(getattr(args, "mixed_precision", asked))


def _read_checkpointing(reading: Reading, args: Any) -> None:
    on = getattr(args, "activation_checkpointing", None)
    options = dict(getattr(args, "activation_checkpointing_kwargs", None) or {})
    if on is None:
        on = getattr(args, "gradient_checkpointing", False)
        options = dict(getattr(args, "gradient_checkpointing_kwargs", None) or {})
    if not on:
        return
    reading.fields["activation_checkpointing"] = "full"
    if options.pop("offload", None):
        reading.fields["activation_offload"] = True
    if options.get("use_reentrant") and getattr(args, "world_size", 1) == 1:
        reading.fields["use_reentrant"] = options.pop("use_reentrant")
    plain = {"use_reentrant": False, "every_n_layers": 1, "selective": False}
    reading.unknown += [
        f"activation checkpointing with `{name}: {value}`"
        for name, value in options.items()
        if value not in (None, plain.get(name))
    ]


def read_environment(reading: Reading, environ: Mapping[str, str] = os.environ) -> AllocatorSettings:
    """The allocator's settings that this process was started with; torch's defaults where it names none."""
    from memplan.preflight.environment import installed_torch_version, parse_settings, variable_in_force

    variable = variable_in_force(environ, installed_torch_version())
    given = parse_settings(environ[variable]) if variable else {}
    names = (
        "expandable_segments",
        "max_split_size_mb",
        "garbage_collection_threshold",
        "roundup_power2_divisions",
    )
    reading.fields["allocator.expandable_segments"] = False
    for name, value in given.items():
        if name in names and not value.startswith("["):
            reading.fields[f"allocator.{name}"] = value
        else:
            reading.notes.append(f"the allocator's `{name}:{value}` is left out")
    fields = {name: value for name, value in reading.fields.items() if name.startswith("allocator.")}
    try:
        return Reading({"model": "?"} | fields).job().allocator
    except JobError:
        reading.notes.append(f"the allocator's settings `{environ[variable or '']}` are left out")
        for name in fields:
            reading.fields[name] = None
        reading.fields["allocator.expandable_segments"] = False
        return AllocatorSettings(expandable_segments=False)


def read_trainer(reading: Reading, trainer: Any, known: Collection[str] = ()) -> None:
    """
    What the Trainer itself does otherwise than transformers' own.

    Args:
        known: methods of its own that have been read.
    """
    from transformers import Trainer

    kind = type(trainer)
    changed = [
        name
        for name in _OVERRIDDEN
        if name not in known and getattr(kind, name, None) is not getattr(Trainer, name, None)
    ]
    if changed:
        reading.unknown.append(f"`{kind.__name__}.{changed[0]}`")
    if len(set((getattr(trainer.model, "hf_device_map", None) or {}).values())) > 1:
        reading.unknown.append("a model spread over several devices")
    if getattr(trainer, "is_deepspeed_enabled", False):
        reading.unknown.append("DeepSpeed")
    if trainer.compute_loss_func is not None:
        reading.unknown.append("`compute_loss_func`")
    if trainer.optimizer_cls_and_kwargs is not None:
        reading.unknown.append("an optimizer of one's own")
    elif trainer.optimizer is not None:
        expected = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)[0]
        found = trainer.optimizer
        while type(found).__name__ == "AcceleratedOptimizer":
            found = found.optimizer
        if type(found) is not expected:
            reading.unknown.append(f"the optimizer {type(found).__name__}")


def read_model(reading: Reading, model: Any, peft_config: Any = None) -> dict[str, Any]:
    """
    The model with what trains of it, and its `config.json` without what is read here.

    Args:
        model: a transformers model, with peft around it or not, or its config.
        peft_config: the adapters that the model will get.
    """
    config = getattr(model, "config", model)
    if not hasattr(config, "to_dict"):
        reading.unknown.append(f"the model {type(model).__name__}, which has no config of transformers")
        return {}
    described = config.to_dict()
    quantization = described.pop("quantization_config", None)
    reading.fields["model"] = getattr(config, "_name_or_path", "") or described.get("model_type") or "model"
    reading.fields["method"] = "full"
    attention = getattr(config, "_attn_implementation", None)
    if attention:
        reading.fields["attention"] = attention
    adapters = getattr(model, "peft_config", None) if peft_config is None else {"default": peft_config}
    if adapters:
        _read_adapters(reading, adapters, _adapted(model) if peft_config is None else None)
    if quantization:
        _read_quantization(reading, quantization, has_adapters=bool(adapters))
    if model is not config:
        described.pop("dtype", None)  # what it was loaded in, not what it is stored in
        _read_parameters(reading, model, has_adapters=bool(adapters) and peft_config is None)
        if getattr(model, "is_gradient_checkpointing", False) and not reading.fields.get(
            "activation_checkpointing"
        ):
            reading.unknown.append(
                "a model that is set to checkpoint its blocks, as peft's preparation does it"
            )
        if has_other_head(class_of(model)):
            reading.unknown.append(f"a {class_of(model)}")
    elif getattr(config, "dtype", None) is not None:
        reading.fields["dtype"] = str(config.dtype)
    return described


def class_of(model: Any) -> str:
    """The name of the class of transformers that a model is of, also inside of peft's."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def _adapted(model: Any) -> list[str]:
    """
    Names of the layers that have an adapter: their last parts, or all of them where other layers are called the same.
    """
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if hasattr(module, "lora_A")]
    last = {name.rpartition(".")[2] for name in names}
    others = any(
        name.rpartition(".")[2] in last and hasattr(module, "weight") and not hasattr(module, "lora_A")
        for name, module in modules.items()
    )
    return sorted({name.removeprefix("base_model.model.") for name in names} if others else last)


def _read_adapters(reading: Reading, adapters: Mapping[str, Any], adapted: list[str] | None) -> None:
    """Adapters by their config, and by the layers that have got them."""
    config = next(iter(adapters.values()))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if len(adapters) > 1 or kind != "LORA":
        reading.unknown.append(f"adapters of type {kind}" if kind != "LORA" else f"{len(adapters)} adapters")
        return
    seen = _SEEN if adapted else ()
    odd = [
        name
        for name, plain in _PLAIN_LORA.items()
        if getattr(config, name, plain[0]) not in plain and name not in seen
    ]
    reading.unknown += [f"`{name}: {getattr(config, name)}` of the adapters" for name in odd]
    targets = adapted or config.target_modules
    reading.fields |= {
        "method": "lora",
        "lora.rank": config.r,
        "lora.alpha": config.lora_alpha,
        "lora.dropout": config.lora_dropout,
        "lora.modules_to_save": list(config.modules_to_save or ()),
    }
    if targets is None:
        reading.unknown.append("adapters on modules that peft chooses")
    else:
        reading.fields["lora.target_modules"] = targets if isinstance(targets, str) else sorted(targets)


def _read_quantization(reading: Reading, quantization: Any, *, has_adapters: bool) -> None:
    given = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    in_4bit, in_8bit = given.get("load_in_4bit"), given.get("load_in_8bit")
    if not (in_4bit or in_8bit) or not has_adapters:
        known = "4 bits" if in_4bit else "8 bits" if in_8bit else None
        words = known or str(given.get("quant_method", "an unknown method"))
        reading.unknown.append(f"a base stored in {words}" + ("" if has_adapters else " without adapters"))
        return
    skipped = given.get("llm_int8_skip_modules")
    if differ := of_single_blocks(skipped or ()):
        reading.unknown.append(f"blocks that differ: `{differ[0]}` stays in 16 bits")
    elif skipped:
        reading.fields["quantization.skip"] = list(skipped)
    if in_8bit:
        reading.fields |= {"method": "qlora", "quantization.type": "int8"}
        odd = {"llm_int8_threshold": (0, 0.0, None), "llm_int8_has_fp16_weight": (True,)}
        reading.unknown += [
            f"`{name}: {given[name]}`"
            for name, values in odd.items()
            if name in given and given[name] in values
        ]
        return
    reading.fields |= {
        "method": "qlora",
        "quantization.type": given.get("bnb_4bit_quant_type", "fp4"),
        "quantization.double_quant": given.get("bnb_4bit_use_double_quant", False),
    }
    storage = str(given.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    if storage in STORAGES:
        reading.fields["quantization.storage"] = storage
    else:
        reading.unknown.append(f"`bnb_4bit_quant_storage: {storage}`")


def _read_parameters(reading: Reading, model: Any, *, has_adapters: bool) -> None:
    """dtypes, and whether all that trains is what the method trains."""
    method = reading.fields["method"]
    is_complete = has_adapters or method == "full"
    base: set[str] = set()
    added: set[str] = set()
    copied: set[str] = set()
    odd = None
    for name, parameter in model.named_parameters():
        is_copy = has_adapters and ".modules_to_save." in name
        is_adapter = is_copy or (has_adapters and "lora_" in name)
        if parameter.dtype.is_floating_point:
            dtypes = copied if is_copy else added if is_adapter else base
            dtypes.add(str(parameter.dtype).removeprefix("torch."))
        if odd is None and parameter.requires_grad != (is_adapter or not has_adapters):
            odd = f"a {'trained' if parameter.requires_grad else 'frozen'} `{name}`"
    if odd is not None and is_complete:
        reading.unknown.append(odd)
    if method == "qlora" and base == {"float32"}:
        compute = reading.fields.get("autocast") or "bfloat16"
        reading.fields |= {"dtype": compute, "quantization.kbit_preparation": True}
    elif len(base) == 1:
        reading.fields["dtype"] = base.pop()
    else:
        reading.unknown.append("a model of several dtypes: " + ", ".join(sorted(base)))
    if len(added) == 1:
        reading.fields["lora.dtype"] = added.pop()
    elif added:
        reading.unknown.append("adapters of several dtypes")
    if len(copied) == 1:
        reading.fields["lora.modules_to_save_dtype"] = copied.pop()
    elif copied:
        reading.unknown.append("copies of several dtypes")
