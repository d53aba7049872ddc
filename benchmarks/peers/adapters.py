"""
One function per peer: a question in, the bytes that the peer says out, by the statistic that it says them of.

Each calls the peer's own code in the peer's own process. A job that a peer has no words for is CannotExpress; what a
peer's sum holds beyond a statistic (its CUDA context, its safety margin) is taken off by the peer's own terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MiB, GiB = 2**20, 2**30

Question = dict[str, Any]
Answer = dict[str, int]
"""Bytes by statistic: `allocated`, `reserved`, `device`."""


class CannotExpress(Exception):
    """The job says something that the peer has no words for."""


def fitcheck(question: Question) -> Answer:
    """Its overhead (context and fragmentation) is the difference between its tensors and its process."""
    import fitcheck as peer

    job, config = question["job"], question["config"]
    _refuse_fused_loss(job)
    missing = [key for key in ("hidden_size", "num_hidden_layers", "intermediate_size") if key not in config]
    if missing:
        raise CannotExpress(f"a config.json without {missing[0]}")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    model = peer.ModelConfig(
        name=question["model"],
        num_params=question["num_parameters"],
        hidden_size=hidden,
        num_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        head_dim=config.get("head_dim") or hidden // heads,
        tie_word_embeddings=question["tied"],
    )
    quantised = job["method"] == "qlora"
    training = peer.TrainingConfig(
        precision=_precision(job),
        quantization="nf4" if quantised else "none",
        double_quant=quantised and job["quantization"]["double_quant"],
        optimizer={"adamw": "adamw", "paged_adamw_8bit": "adamw8bit"}[job["optimizer"]],
        batch_size=job["micro_batch_size"],
        seq_len=job["max_seq_len"],
        lora_rank=None if job["method"] == "full" else job["lora"]["rank"],
        lora_targets=question["targets"],
        grad_checkpoint=job["activation_checkpointing"] == "full",
        flash_attn=job["attention"] != "eager",
    )
    known = {"NVIDIA A100-SXM4-80GB": "a100-80", "Tesla T4": "t4"}.get(job["gpu"])
    capacity = question["gpu_bytes"] // MiB
    card = peer.get_gpu(known) if known else peer.GpuSpec(job["gpu"], capacity, capacity)
    report = peer.estimate(model, training, card)
    return {
        "allocated": int((report.total_mib - report.overhead_mib) * MiB),
        "device": int(report.total_mib * MiB),
    }


def canifinetune(question: Question) -> Answer:
    """
    Its target is the reserved peak, with its safety margin beside it; one term holds cache and context. It takes a
    fused loss, but says that it keeps the stock one's bytes for it and claims nothing of them.
    """
    from canifinetune.estimator import EstimateRequest, estimate

    job, config = question["job"], question["config"]
    _refuse_fused_loss(job)
    heads, hidden = (_first(config, "num_attention_heads", "n_head"), _first(config, "hidden_size", "n_embd"))
    request = EstimateRequest(
        model_id=question["model"],
        override={
            "family": config["model_type"],
            "hidden_size": hidden,
            "num_hidden_layers": _first(config, "num_hidden_layers", "n_layer"),
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "intermediate_size": config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
            "vocab_size": config["vocab_size"],
            "total_params": question["num_parameters"],
            "tie_word_embeddings": question["tied"],
        },
        method=job["method"],
        seq_len=job["max_seq_len"],
        micro_batch_size=job["micro_batch_size"],
        base_dtype=_precision(job),
        quantization="nf4_double_quant" if job["quantization"]["double_quant"] else "nf4",
        lora_rank=job["lora"]["rank"],
        target_modules=question["targets"] if job["method"] != "full" else None,
        optimizer={"adamw": "adamw_torch"}.get(job["optimizer"], job["optimizer"]),
        gradient_checkpointing=job["activation_checkpointing"] == "full",
        attention_implementation=job["attention"],
        gpu_vram_gb=question["gpu_bytes"] / GiB,
        use_network=False,
    )
    memory = estimate(request).memory
    total = int((memory.total_estimated_gb - memory.safety_margin_gb) * GiB)
    return {"reserved": total, "device": total}


def fitscout(question: Question) -> Answer:
    """Its overhead is the CUDA context. Adapters are always counted on two projections."""
    from fitscout import ModelProfile
    from fitscout.memory.estimator import estimate_memory
    from fitscout.model.introspect import extract_arch_fields

    job = question["job"]
    _refuse_fused_loss(job)
    fields = extract_arch_fields(question["config"]) | {"tie_word_embeddings": question["tied"]}
    size = 4 if _precision(job) == "fp32" else 2
    report = estimate_memory(
        ModelProfile(params=question["num_parameters"], dtype_bytes=size, **fields),
        method=job["method"],
        micro_batch=job["micro_batch_size"],
        seq_len=job["max_seq_len"],
        grad_ckpt=job["activation_checkpointing"] == "full",
        opt_8bit=job["optimizer"].endswith("8bit"),
        lora_rank=job["lora"]["rank"],
        grad_dtype_bytes=4 if job["method"] != "full" else size,
    )
    return {
        "allocated": int((report.total_gb - report.overhead_gb) * GiB),
        "device": int(report.total_gb * GiB),
    }


def ftuneai(question: Question) -> Answer:
    """Its overhead is a share of everything, for context and cache together."""
    from ftuneai import LoRATarget, ModelSpec, OptimizerType, Quantization, TrainingConfig
    from ftuneai.core.memory import MemoryEstimator
    from ftuneai.core.models import FineTuneMethod

    job, config = question["job"], question["config"]
    _refuse_fused_loss(job)
    heads, hidden = (_first(config, "num_attention_heads", "n_head"), _first(config, "hidden_size", "n_embd"))
    model = ModelSpec(
        name=question["model"],
        parameters=question["num_parameters"],
        hidden_size=hidden,
        num_layers=_first(config, "num_hidden_layers", "n_layer"),
        num_attention_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        intermediate_size=config.get("intermediate_size") or 4 * hidden,
        vocab_size=config["vocab_size"],
        max_seq_length=_first(config, "max_position_embeddings", "n_positions"),
        default_dtype=_precision(job),
    )
    training = TrainingConfig(
        method=FineTuneMethod(job["method"]),
        quantization=Quantization.INT4 if job["method"] == "qlora" else Quantization.NONE,
        batch_size=job["micro_batch_size"],
        seq_length=job["max_seq_len"],
        gradient_checkpointing=job["activation_checkpointing"] == "full",
        optimizer=OptimizerType.ADAM_8BIT if job["optimizer"].endswith("8bit") else OptimizerType.ADAMW,
        lora_rank=job["lora"]["rank"],
        lora_target=LoRATarget.ATTENTION_ALL,
        flash_attention=job["attention"] != "eager",
    )
    return {"device": int(MemoryEstimator(model, training).estimate().total_gb * GiB)}


def torch_preflight(question: Question) -> Answer:
    """LoRA is a share of frozen parameters to it; context and cache are terms of their own."""
    from torch_preflight.vram import ModelProfile, OptimizerKind, PrecisionMode, RunConfig, estimate_config
    from torch_preflight.vram.providers.hub import shape_from_config
    from torch_preflight.vram.types import Confidence, ModelKind

    job = question["job"]
    _refuse_fused_loss(job)
    if job["method"] == "qlora":
        raise CannotExpress("4-bit weights")
    shape = shape_from_config(question["config"])
    if shape is None:
        raise CannotExpress("this config.json")
    total = question["num_parameters"] + (question["trainable"] if job["method"] == "lora" else 0)
    profile = ModelProfile(
        question["model"], total, total, "config", Confidence.MEDIUM, ModelKind.TRANSFORMER, shape=shape
    )
    amp = job["dtype"] == "float32" and job["autocast"]
    config = RunConfig(
        batch_size=job["micro_batch_size"],
        seq_len=job["max_seq_len"],
        precision=PrecisionMode.AMP if amp else PrecisionMode.PURE_BF16,
        optimizer=OptimizerKind.ADAM_8BIT if job["optimizer"].endswith("8bit") else OptimizerKind.ADAMW,
        gradient_checkpointing=job["activation_checkpointing"] == "full",
        flash_attention=job["attention"] != "eager",
        frozen_fraction=1 - question["trainable"] / total,
    )
    parts = estimate_config(profile, config, with_remediations=False).breakdown
    return {
        "allocated": parts.total - parts.cuda_context - parts.fragmentation,
        "reserved": parts.total - parts.cuda_context,
        "device": parts.total,
    }


def accelerate(question: Question) -> Answer:
    """The `Training using Adam` of `estimate-memory`, in its line for 16 bits: no batch, no activations."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    if question["job"]["method"] != "full":
        raise CannotExpress("training of adapters")
    total, _ = calculate_maximum_sizes(_on_meta(question["config"]))
    return {"allocated": int(max(estimate_training_usage(total, "float16").values()))}


def mem_tracker(question: Question) -> Answer:
    """torch's MemTracker over two steps on fake CPU tensors."""
    from benchmarks.peers.tracked import tracked_peak_bytes

    job = question["job"]
    _refuse_fused_loss(job)
    if job["method"] == "qlora":
        raise CannotExpress("bitsandbytes' layers on fake tensors")
    if job["optimizer"] != "adamw":
        raise CannotExpress("bitsandbytes' optimizers on fake tensors")
    return {"allocated": tracked_peak_bytes(job, question["config"], question["targets"])}


def _on_meta(config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))


def _refuse_fused_loss(job: dict[str, Any]) -> None:
    if job["loss"] == "fused":
        raise CannotExpress("a fused loss")


def _precision(job: dict[str, Any]) -> str:
    """Of a model in one dtype; autocast over bfloat16 weights computes in bfloat16 all the same."""
    if job["dtype"] == "float32" and job["autocast"]:
        raise CannotExpress("autocast over float32 weights")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[job["dtype"]]


def _first(config: dict[str, Any], *names: str) -> int:
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise CannotExpress(f"a config.json without {names[0]}")


ADAPTERS: dict[str, tuple[str, Callable[[Question], Answer]]] = {
    "fitcheck-llm": ("fitcheck", fitcheck),
    "canifinetune": ("canifinetune", canifinetune),
    "fitscout": ("fitscout", fitscout),
    "ftuneai": ("ftuneai", ftuneai),
    "torch-preflight": ("torch_preflight", torch_preflight),
    "accelerate": ("accelerate", accelerate),
    "torch": ("torch", mem_tracker),
}
"""Distribution: the module whose absence means that it is not installed, and the adapter."""
