"""Hypothesis strategies for the contracts that rooms share. A new field of the job is drawn by itself."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from memplan.job.fields import Field, job_fields
from memplan.job.spec import Job, Train
from memplan.tape.sharded.sharding import SHARDED

_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_attn", "lm_head")


def texts() -> st.SearchStrategy[str]:
    """Any text that a field can hold: not blank, and not a spelling of null."""
    return st.text(min_size=1, max_size=40).filter(
        lambda text: bool(text.strip()) and text.lower() not in ("none", "null")
    )


@st.composite
def jobs(draw: st.DrawFn, **fixed: Any) -> Job:
    """
    Jobs that are in order, over the whole range of every field.

    Args:
        fixed: values for fields that are not drawn, by dotted name: `jobs(model="gpt2", **{"lora.rank": 8})`.
    """
    drawn = {name: draw(_values(field)) for name, field in job_fields().items() if name not in fixed}
    if not any(name.startswith("parallel.") for name in fixed):
        drawn |= {f"parallel.{name}": value for name, value in draw(_parallel()).items()}
    return agreeing(Job(model="gpt2").replace(**drawn, **fixed))


def agreeing(job: Job) -> Job:
    """The job without what its fields cannot say together."""
    changes: dict[str, Any] = {}
    if job.train.warmup_ratio is not None:
        changes["train.warmup_steps"] = 0
    if job.train.sample_tokens >= job.max_seq_len:
        changes["train.sample_prompts"] = 0
    if job.npt.target == "all" and job.npt.variant == "diag":
        changes["npt.target"] = "gate_up"
    if "lm_head" not in job.quantization.skip:
        changes["npt.logits_weight"] = 0.0
    if job.train.epochs is not None:
        changes["train.max_steps"] = Train.max_steps
    if job.train.min_learning_rate > job.train.learning_rate:
        changes["train.min_learning_rate"] = job.train.learning_rate
    if job.data.eval is None:
        changes |= {"train.eval_every": None, "train.early_stopping": None}
    needs_blocks = (
        job.activation_checkpointing != "none" or job.parallel.strategy != "NO_SHARD" or job.offload.params
    )
    if job.parallel.strategy in ("ZERO_1", "ZERO_2"):
        changes["offload.params"] = False
    if job.loop == "hf_trainer" and not job.parallel.strategy.startswith("ZERO_"):
        changes["offload.optimizer"] = False
    if (
        job.method == "npt"
        or job.has_quantized_base
        or job.offload.params
        or job.parallel.strategy not in SHARDED
    ):
        changes["parallel.fsdp_version"] = 2
    elif job.parallel.fsdp_version == 1:
        changes |= {"loop": "hf_trainer", "offload.optimizer": False}
    if (
        job.offload.params
        or job.method == "npt"
        or job.parallel.strategy not in ("NO_SHARD", "ZERO_1", "ZERO_2")
    ):
        changes["quantization.type"] = "fp4"
    elif job.has_gptq_base and job.loop == "memplan":
        changes["quantization.type"] = "nf4"
    elif job.has_gptq_base:
        changes |= {"dtype": "float16", "quantization.kbit_preparation": False}
        changes["autocast"] = None if job.autocast == "bfloat16" else job.autocast
    if (
        job.activation_checkpointing == "selective"
        or job.activation_offload
        or job.parallel.strategy not in ("NO_SHARD", "ZERO_1", "ZERO_2")
    ):
        changes["use_reentrant"] = False
    if job.quantization.storage != job.autocast:
        changes["quantization.storage"] = "uint8"
    if job.method == "npt" and needs_blocks:
        changes["npt.objective"] = "layer"
    if job.method == "npt" and job.parallel.strategy.startswith("ZERO_"):
        changes["parallel.strategy"] = "FULL_SHARD"
    dtype = changes.get("dtype", job.dtype)
    if job.attention == "flash_attention_2" and dtype == "float32" and job.autocast is None:
        changes["autocast"] = "bfloat16"
    if job.method == "npt":
        changes["data.special_tokens"], changes["loop"] = (), "memplan"
    elif "lm_head" in job.lora.target_modules or "lm_head" not in job.quantization.skip:
        changes["lora.train_tokens"] = False
    if changes.get("loop", job.loop) == "memplan":
        changes["kernels"] = "torch"
    if changes.get("loop", job.loop) != "hf_trainer" or job.activation_offload:
        changes["offload.activations"] = "none"
    if changes.get("loop", job.loop) != "hf_trainer":
        changes["padding_free"] = False
    if (
        changes.get("parallel.fsdp_version", job.parallel.fsdp_version) == 1
        or job.parallel.strategy == "ZERO_3"
    ):
        changes["lora.modules_to_save"] = ()
    agreed = job.replace(**changes)
    runs_torchao = agreed.loop != "memplan" and not agreed.parallel.strategy.startswith("ZERO_")
    if not runs_torchao or agreed.offload.params or agreed.offload.optimizer:
        agreed = agreed.replace(
            optimizer=agreed.optimizer.removeprefix("ao_").replace("_4bit", "").replace("_fp8", "")
        )
    return agreed


def _values(field: Field) -> st.SearchStrategy[Any]:
    special = _SPECIAL.get(field.name)
    values = special if special is not None else _values_of_kind(field, field.kinds[0])
    return st.none() | values if field.nullable else values


def _values_of_kind(field: Field, kind: str) -> st.SearchStrategy[Any]:
    if field.choices:
        return st.sampled_from([choice for choice in field.choices if choice is not None])
    if kind == "bool":
        return st.booleans()
    if kind == "int":
        return st.integers(min_value=int(field.minimum or 0), max_value=1 << 24)
    if kind == "float":
        return st.floats(
            min_value=field.minimum,
            max_value=field.below if field.below is not None else 1e9,
            exclude_min=field.exclusive,
            exclude_max=field.below is not None,
        )
    return texts()


def _names(alphabet: st.SearchStrategy[str], **bounds: int) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(alphabet, unique=True, max_size=6, **bounds).map(tuple)


_SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "lora.target_modules": st.sampled_from(
        (
            "all-linear",
            r".*\.(q|v)_proj",
            r"model\.layers\.[\d]+\.mlp\.(up|down)_proj",
            "lm_head|.*[02].*_proj",
        )
    )
    | _names(st.sampled_from(_MODULES) | texts().filter(lambda text: text != "all-linear"), min_size=1),
    "lora.modules_to_save": st.just(()) | _names(st.sampled_from(("embed_tokens", "lm_head")) | texts()),
    "npt.logits_weight": st.floats(0, 1),
    "npt.layers": st.sampled_from(("all", "upper_half", "lower_half"))
    | st.lists(st.integers(0, 200), unique=True, min_size=1, max_size=6).map(tuple),
    "data.special_tokens": _names(texts()),
    "data.vocab_multiple": st.sampled_from((1, 8, 64, 128)),
    "quantization.skip": _names(st.sampled_from(_MODULES) | texts()),
    "gpu": st.sampled_from(("24GB", "24GiB", "live", "RTX 4090", "NVIDIA H100 80GB HBM3")) | texts(),
    "margin": st.sampled_from(("5%", "0%", "12.5 %", "1GiB", "512 MiB", "0")),
    "allocator.roundup_power2_divisions": st.sampled_from((1, 2, 4, 8, 16)),
    **{f"parallel.{degree}": st.just(1) for degree in ("dp_shard", "dp_replicate", "tp", "pp", "cp", "ep")},
    "parallel.strategy": st.just("NO_SHARD"),
}


@st.composite
def _parallel(draw: st.DrawFn) -> dict[str, Any]:
    """A strategy, and degrees that go with it."""
    strategy = draw(st.sampled_from(job_fields()["parallel.strategy"].choices))
    shards = strategy != "NO_SHARD"
    replicates = strategy in ("NO_SHARD", "HYBRID_SHARD")
    return {
        "strategy": strategy,
        "dp_shard": draw(st.integers(2, 64)) if shards else 1,
        "dp_replicate": draw(st.integers(2 if shards else 1, 64)) if replicates else 1,
    }
