"""
The shape writer's tape is that of the real step: the same allocations and frees in the same order, and so the same
peak, reserved bytes and need.

`MEMPLAN_EXAMPLES` draws more jobs than a run in CI does.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import JobError
from memplan.job.spec import Job
from memplan.model import architecture_from_config
from memplan.model.catalogue import find_model
from memplan.tape.writer import write_tape
from memplan.tracing.writer import trace_job
from tracing.comparison import Comparison, compare
from tracing.tiny import CONFIGS, job

SAVED, BOTH = "lora__modules_to_save", ["embed_tokens", "lm_head"]
BYTES = {"method": "qlora", "quantization__type": "int8"}
REENTRANT = {"loop": "hf_trainer", "activation_checkpointing": "full", "use_reentrant": True}
CKPT, LOSS, HEADS = "activation_checkpointing", "gradient_accumulation_steps", "lora__target_modules"

MATERIALISED = {"method": "npt", "npt__rank": 4, "npt__form": "materialised"}

GRID: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"dtype": "float32", CKPT: "selective"}),
    ("llama", {"attention": "eager", CKPT: "full", "optimizer_kernel": "foreach"}),
    ("llama", {"optimizer_kernel": "loop", LOSS: 4, "train__max_grad_norm": 1.0}),
    ("llama", {"dtype": "float32", "autocast": "bfloat16", "loss": "chunked"}),
    ("llama", {"dtype": "float16", "method": "lora", HEADS: "[q_proj,v_proj]"}),
    ("llama", {"method": "lora", CKPT: "full", "lora__dropout": 0.1, LOSS: 2}),
    ("llama", {"method": "lora", "attention": "eager", "loop": "script", "lora__dtype": "bfloat16"}),
    ("mixtral", {"method": "lora", "dtype": "float32", "autocast": "bfloat16"}),
    ("mixtral", {"method": "lora", "dtype": "float16", CKPT: "full"}),
    ("qwen3", {"attention": "flash_attention_2", "micro_batch_size": 1, "max_seq_len": 512}),
    ("falcon", {"attention": "flash_attention_2", "max_seq_len": 512}),
    ("llama", {"method": "npt", "npt__rank": 4, LOSS: 4, "attention": "eager"}),
    ("llama", {"method": "npt", "npt__rank": 4, "autocast": "bfloat16", "dtype": "float32"}),
    ("llama", {"method": "npt", "npt__rank": 4, "npt__target": "all", "npt__variant": "linear", LOSS: 2}),
    ("llama", {"method": "npt", "npt__rank": 4, "npt__target": "gate_up", "npt__variant": "outer"}),
    ("gpt2", {"method": "npt", "npt__rank": 4, "npt__target": "all", "npt__variant": "outer"}),
    ("llama, as many key heads", {"attention": "eager", "micro_batch_size": 1}),
    ("mistral", {"loop": "script", "dtype": "float32", "autocast": "bfloat16"}),
    ("qwen2, tied", {LOSS: 4, "loss": "chunked", "optimizer_kernel": "foreach", "train__weight_decay": 0.1}),
    ("qwen2", {"method": "lora", "dtype": "float32", "autocast": "bfloat16", CKPT: "full"}),
    ("qwen3", {"method": "lora", HEADS: "[q_proj,lm_head]", "train__max_grad_norm": 1.0}),
    ("qwen3", {"attention": "eager", CKPT: "full", "loop": "script"}),
    (
        "qwen2, tied",
        {"method": "lora", LOSS: 2, "data__special_tokens": "[<a>,<b>,<c>]", "data__vocab_multiple": 64},
    ),
    ("llama", {"method": "lora", "loss": "chunked", "data__special_tokens": [f"<{n}>" for n in range(40)]}),
    ("llama", {"method": "lora", HEADS: r"model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"}),
    ("llama", {"method": "lora", HEADS: r".*\.(1|3)\.self_attn\.(q|v)_proj", CKPT: "full"}),
    (
        "llama",
        {
            "method": "lora",
            HEADS: r".*\.[24]\.mlp\.(up|down)_proj|lm_head",
            "train__max_grad_norm": 1.0,
            "optimizer_kernel": "foreach",
        },
    ),
    ("llama", {"method": "lora", HEADS: "[layers.2.self_attn.q_proj,layers.5.mlp.down_proj]"}),
    ("llama", {"method": "qlora", HEADS: r".*\.[03]\.mlp\.(up|down)_proj", CKPT: "full", LOSS: 2}),
    ("llama", {"method": "lora", HEADS: r".*\.[14]\.self_attn\.(q|v)_proj", "parallel__dp_replicate": 2}),
    (
        "llama",
        {
            "method": "lora",
            HEADS: r".*\.[14]\.self_attn\.(q|v)_proj",
            "parallel__strategy": "FULL_SHARD",
            "parallel__dp_shard": 2,
        },
    ),
    (
        "gpt2",
        {"method": "lora", HEADS: r"transformer\.h\.[0-2]\.attn\.c_attn", "loop": "hf_trainer", CKPT: "full"},
    ),
    ("bert", {"method": "lora", HEADS: r".*layer\.[45]\..*(query|value)"}),
    ("granite", {"method": "lora", "loop": "hf_trainer", CKPT: "full", LOSS: 2}),
    ("granite", {"dtype": "float32", "autocast": "bfloat16", "loss": "chunked"}),
    ("granite, biased", {"attention": "eager", CKPT: "selective", "loop": "script"}),
    ("granite, biased", {"method": "qlora", "train__max_grad_norm": 1.0}),
    ("granite", {"loss": "fused"}),
    ("gpt2", {LOSS: 2, "train__max_grad_norm": 1.0}),
    ("gpt2", {"attention": "eager", "micro_batch_size": 1, "optimizer_kernel": "loop"}),
    ("gpt2", {"method": "lora", "dtype": "float32", "autocast": "bfloat16"}),
    ("gpt2", {"optimizer": "adafactor", "optimizer_kernel": "loop", "train__weight_decay": 0.1}),
    ("llama", {"optimizer": "adafactor", "optimizer_kernel": "loop", "method": "lora"}),
    ("gpt2", {"method": "npt", "npt__rank": 4, "loss": "chunked"}),
    ("llama", {"method": "qlora"}),
    ("gemma3", {"method": "qlora", CKPT: "full"}),
    (
        "llama",
        {"method": "qlora", "dtype": "float32", "autocast": "bfloat16", "quantization__double_quant": False},
    ),
    ("llama", {"method": "qlora", "quantization__kbit_preparation": True, "loop": "script"}),
    ("qwen2", {"method": "qlora", "dtype": "float32", "autocast": "bfloat16"}),
    ("qwen2", {"method": "qlora", "quantization__kbit_preparation": True, CKPT: "full"}),
    ("qwen2", {"method": "npt", "npt__rank": 4, "npt__quantized_base": True}),
    ("gpt2", {"attention": "eager", "packing": True, "method": "lora", CKPT: "selective"}),
    ("gpt2", {"attention": "eager", "packing": True, "dtype": "float32", "autocast": "bfloat16"}),
    ("gpt2", {"method": "qlora", LOSS: 2}),
    ("gpt2", {"method": "qlora", "loop": "script", "quantization__kbit_preparation": True, CKPT: "full"}),
    (
        "gpt2",
        {"method": "qlora", "dtype": "float32", "autocast": "bfloat16", "quantization__double_quant": False},
    ),
    ("gpt2", {"method": "npt", "npt__rank": 4, "npt__quantized_base": True}),
    ("falcon", {"method": "qlora", "attention": "eager"}),
    ("falcon, grouped", {"method": "qlora", "dtype": "float32", "autocast": "bfloat16", CKPT: "full"}),
    ("gpt_bigcode", {"method": "qlora"}),
    ("gpt_bigcode", {"method": "qlora", "loop": "hf_trainer", CKPT: "selective", "lora__dtype": "bfloat16"}),
    ("llama", BYTES | {CKPT: "full", LOSS: 2}),
    ("llama", BYTES | {"dtype": "float16", "loop": "hf_trainer"}),
    ("qwen2", BYTES | {"dtype": "float32", "autocast": "bfloat16", CKPT: "full"}),
    ("qwen2", BYTES | {"quantization__kbit_preparation": True, "loop": "script", CKPT: "full", LOSS: 2}),
    ("gpt2", BYTES | {"attention": "eager"}),
    ("gemma2", BYTES | {"attention": "eager", "quantization__skip": [], HEADS: "[q_proj,v_proj]"}),
    (
        "granite, biased",
        BYTES | {"loop": "hf_trainer", CKPT: "selective", "quantization__kbit_preparation": True},
    ),
    ("llama", BYTES | REENTRANT | {"quantization__kbit_preparation": True, "autocast": "bfloat16", LOSS: 2}),
    ("gpt2", BYTES | REENTRANT | {"dtype": "float32", "autocast": "bfloat16"}),
    ("llama", REENTRANT | {"method": "lora"}),
    ("llama, wide heads", {}),
    (
        "qwen2",
        MATERIALISED | {"npt__variant": "linear", "dtype": "float32", "autocast": "bfloat16"},
    ),
    ("llama", {"method": "lora", "packing": True, "loop": "script"}),
    ("gemma", {"loop": "script", CKPT: "full", "attention": "eager"}),
    ("gemma", {"method": "lora", "gpu": "Tesla T4"}),
    ("llama", {"max_seq_len": 1024, "gpu": "Tesla T4"}),
    (
        "gpt2",
        {"micro_batch_size": 4, "max_seq_len": 512, "dtype": "float32", "autocast": "bfloat16", LOSS: 2},
    ),
    ("gemma2", {"method": "qlora", "attention": "eager", "quantization__kbit_preparation": True}),
    ("gemma2", {"method": "lora", "attention": "eager", "loss": "chunked"}),
    ("gemma3", {"method": "lora", CKPT: "selective"}),
    ("phi3", {"attention": "eager", CKPT: "full", "max_seq_len": 256}),
    ("olmo", {"dtype": "float32", "autocast": "bfloat16", "loop": "script"}),
    ("olmo2", {"method": "lora", HEADS: "[q_proj,v_proj]", "lora__dropout": 0.1}),
    ("olmo3", {"loss": "chunked", "attention": "eager"}),
    ("gpt_neox", {"dtype": "float32", "autocast": "bfloat16", "loop": "script"}),
    ("gpt_neox", {"method": "lora", CKPT: "full"}),
    ("mixtral", {"method": "lora", "loop": "script"}),
    ("falcon", {"attention": "eager"}),
    ("falcon", {"dtype": "float32", "autocast": "bfloat16", "loop": "script"}),
    ("falcon, grouped", {"method": "lora", CKPT: "full"}),
    ("falcon, grouped", {"attention": "flash_attention_2", "dtype": "float32", "autocast": "float16"}),
    ("gpt_bigcode", {"attention": "eager", CKPT: "full"}),
    ("gpt_bigcode", {"method": "lora", "loop": "script"}),
    ("gpt2", {"attention_kernel": "math", "method": "lora"}),
    ("bert", {"dtype": "float32", "autocast": "float16", "attention": "eager", "loop": "script"}),
    ("bert", {"method": "lora", HEADS: "[query,value]", CKPT: "full"}),
    ("bert", {"method": "lora", "attention": "eager", "data__special_tokens": "[<a>,<b>]"}),
    ("bert", {"loop": "hf_trainer", "method": "lora", "attention": "eager"}),
    ("bert", {"dtype": "float16", "autocast": "bfloat16"}),
    ("gpt2", {"autocast": "bfloat16", "optimizer": "adamw_8bit"}),
    ("gpt2", {"optimizer": "ao_adamw_8bit", "loop": "hf_trainer", LOSS: 2}),
    ("llama", {"optimizer": "ao_adamw_4bit", "loop": "script", "dtype": "float32", "autocast": "bfloat16"}),
    ("llama", {"optimizer": "ao_adamw_fp8", "loop": "hf_trainer", "method": "lora", CKPT: "full"}),
    (
        "llama",
        {"optimizer": "ao_adamw_4bit", "loop": "hf_trainer", "method": "qlora", "lora__dtype": "bfloat16"},
    ),
    ("llama", {"method": "lora", "loss": "fused", "data__special_tokens": "[<a>]"}),
    ("qwen2", {"loss": "fused", "optimizer": "paged_adamw_8bit"}),
    ("llama", {"dtype": "float16", "autocast": "float16", "attention": "flash_attention_2"}),
    ("gpt2", {"loop": "hf_trainer", "dtype": "float32", "autocast": "bfloat16", LOSS: 2}),
    ("llama", {"loop": "hf_trainer", "method": "lora", CKPT: "full", LOSS: 4, "train__max_grad_norm": 1.0}),
    ("qwen3", {"loop": "hf_trainer", CKPT: "full", "activation_offload": True}),
    ("llama", {"loop": "hf_trainer", "attention": "eager", CKPT: "full"}),
    ("mistral, sliding", {"loop": "hf_trainer", "method": "lora"}),
    ("gemma3", {"loop": "hf_trainer", "attention": "eager"}),
    ("falcon", {"loop": "hf_trainer", "micro_batch_size": 3}),
    ("gpt2", {"loop": "hf_trainer", "attention": "flash_attention_2", "max_seq_len": 512}),
    ("bert", {"loop": "hf_trainer", "attention": "flash_attention_2"}),
    ("llama", {"loop": "hf_trainer", "padding_free": True, "method": "lora", LOSS: 2, CKPT: "full"}),
    ("gpt2", {"loop": "hf_trainer", "padding_free": True, "attention": "eager"}),
    ("mistral, sliding", {"loop": "hf_trainer", "padding_free": True, "max_seq_len": 100}),
    (
        "llama",
        {"method": "lora", SAVED: BOTH, "loop": "hf_trainer", "autocast": "bfloat16", CKPT: "full", LOSS: 2},
    ),
    (
        "llama",
        {"method": "lora", SAVED: ["lm_head"], "optimizer_kernel": "foreach", "train__max_grad_norm": 1.0},
    ),
    ("qwen2, tied", {"method": "lora", SAVED: BOTH, "optimizer_kernel": "foreach", "loop": "script"}),
    ("qwen2, tied", {"method": "lora", SAVED: ["embed_tokens"], "data__special_tokens": "[<a>,<b>]"}),
    (
        "qwen2, tied",
        {"method": "lora", SAVED: BOTH, "loss": "chunked", "lora__modules_to_save_dtype": "float32"},
    ),
    ("llama", {"method": "qlora", SAVED: BOTH, "loop": "hf_trainer", "quantization__kbit_preparation": True}),
    ("gpt2", {"method": "qlora", SAVED: ["wte", "lm_head"], "loop": "hf_trainer", "optimizer": "adamw_8bit"}),
    ("gemma3", {"method": "lora", SAVED: BOTH, "loop": "script", "dtype": "float32", "autocast": "bfloat16"}),
    ("bert", {"method": "lora", SAVED: ["word_embeddings", "decoder"]}),
    ("llama", {"method": "lora", SAVED: BOTH, "parallel__dp_replicate": 2}),
    (
        "qwen2, tied",
        {"method": "lora", SAVED: BOTH, "parallel__strategy": "FULL_SHARD", "parallel__dp_shard": 4},
    ),
]

NEARLY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"optimizer": "adafactor", "optimizer_kernel": "foreach"}),
    ("llama", BYTES | REENTRANT | {"loop": "script"}),
    ("llama", {"method": "npt", "npt__rank": 4, "npt__objective": "end_to_end"}),
    (
        "llama",
        {
            "method": "npt",
            "npt__rank": 4,
            "npt__target": "gate_up",
            "npt__variant": "outer",
            "npt__components": 2,
        },
    ),
]
"""What docs/tracing.md lists: other events, nearly the same peak."""

UNORDERED = ("gemma3", "olmo3")
"""transformers makes their rotary tables in the order of a set, which is another in every process."""
ONLY_BFLOAT16 = ("mixtral",)
"""torch.grouped_mm on meta tensors takes nothing else."""

REAL = [
    ("llama-3.1-8b", {"method": "lora", CKPT: "full", "max_seq_len": 1024}),
    ("mistral-7b-v0.3", {"method": "lora", "loop": "script", "max_seq_len": 2048}),
    ("qwen2.5-0.5b", {LOSS: 2, "attention": "eager", "max_seq_len": 512}),
    ("qwen3-8b", {"method": "npt", "max_seq_len": 1024}),
    ("gpt2", {"micro_batch_size": 4, "max_seq_len": 512, "dtype": "float32", "autocast": "bfloat16"}),
    ("bert-base-uncased", {"max_seq_len": 512, "micro_batch_size": 8}),
]


def assert_equal(both: Comparison, *, ordered: bool = True) -> None:
    """Not `ordered`: which of two tensors of the same size goes first is left open."""
    shape, trace = both.lifetimes(both.shape), both.lifetimes(both.trace)
    if not ordered:
        shape, trace = both.events_by_run(both.shape), both.events_by_run(both.trace)
    assert shape == trace, both.first_difference()
    assert both.num_small(both.shape) == both.num_small(both.trace)
    assert both.memory(both.shape) == both.memory(both.trace)


@pytest.mark.parametrize(("model", "fields"), GRID, ids=str)
def test_every_event_is_that_of_the_trace(model: str, fields: dict[str, Any]) -> None:
    """Every choice of the grid that `jobs` draws from, at least once."""
    assert_equal(compare(job(**fields), CONFIGS[model]), ordered=model not in UNORDERED)


@pytest.mark.parametrize(("model", "fields"), NEARLY, ids=str)
def test_what_is_not_equal_is_near(model: str, fields: dict[str, Any]) -> None:
    """Within 0.5 % of the traced peak, and not equal: what has become equal belongs into the grid."""
    both = compare(job(**fields), CONFIGS[model])
    shape, trace = both.peaks()
    with pytest.raises(AssertionError):
        assert_equal(both, ordered=model not in UNORDERED)
    assert shape == pytest.approx(trace, rel=0.005)


@pytest.mark.parametrize(("model", "fields"), REAL, ids=str)
def test_in_real_sizes(model: str, fields: dict[str, Any]) -> None:
    """All blocks of models as they are trained."""
    entry = find_model(model)
    assert entry is not None
    assert_equal(compare(job(**fields), entry.config))


def test_liger_has_no_fused_loss_for_granite_in_other_loops() -> None:
    architecture = architecture_from_config(CONFIGS["granite"], name="tiny", source="test")
    with pytest.raises(JobError, match="Granite in `loop: memplan` only"):
        write_tape(job(loss="fused", loop="hf_trainer"), architecture)


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (
            "llama",
            {SAVED: ["q_proj"]},
            "names `q_proj`, and whole copies are planned of the input embeddings",
        ),
        (
            "llama",
            {SAVED: ["lm_head"], HEADS: "[q_proj,lm_head]"},
            "cannot have an adapter and be trained whole",
        ),
        ("llama", {SAVED: ["lm_head"], "method": "qlora", "quantization__skip": []}, "is quantised"),
        (
            "qwen2, tied",
            {SAVED: BOTH, "loop": "hf_trainer", "parallel__strategy": "FULL_SHARD", "parallel__dp_shard": 2},
            "does not run with `FULL_SHARD`",
        ),
    ],
)
def test_copies_that_do_not_train_are_refused_by_both(model: str, fields: dict[str, Any], words: str) -> None:
    planned = job(**{"method": "lora"} | fields)
    with pytest.raises(JobError, match=words) as by_shape:
        write_tape(planned, architecture_from_config(CONFIGS[model], name="tiny", source="test"))
    with pytest.raises(JobError) as by_trace:
        trace_job(planned, CONFIGS[model])
    assert by_trace.value.message == by_shape.value.message


FAMILIES = sorted(set(CONFIGS) - {model for model, _ in NEARLY} | {"llama", "gemma3"})
NPT_MODELS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
WITHOUT_PROJECTIONS = ("falcon", "falcon, grouped", "gpt2", "gpt_bigcode", "gpt_neox", "phi3")
"""Models whose query, key and value are one product."""


@st.composite
def jobs(draw: st.DrawFn) -> tuple[str, Job]:
    """A tiny model and a job of it."""
    family = draw(st.sampled_from(FAMILIES))
    dtype, autocast = (
        ("bfloat16", None)
        if family in ONLY_BFLOAT16
        else draw(
            st.sampled_from(
                [
                    ("bfloat16", None),
                    ("float16", None),
                    ("float32", None),
                    ("float32", "bfloat16"),
                    ("float32", "float16"),
                ]
            )
        )
    )
    can_be_npt = family.split(",")[0] in NPT_MODELS
    methods = ["full", "lora", "npt", "qlora"] if can_be_npt else ["full", "lora", "qlora"]
    method = draw(st.sampled_from(methods))
    fields: dict[str, Any] = {
        "method": method,
        "dtype": dtype,
        "attention": draw(st.sampled_from(["eager"] if family == "gemma2" else ["sdpa", "eager"])),
        CKPT: draw(st.sampled_from(["none", "full", "selective"])),
        LOSS: draw(st.sampled_from([1, 2, 4])),
        "optimizer_kernel": draw(st.sampled_from(["fused", "foreach", "loop"])),
        "micro_batch_size": draw(st.integers(1, 3)),
        "max_seq_len": draw(st.sampled_from([64, 100, 128])),
    }
    if autocast is not None:
        fields["autocast"] = autocast
    if draw(st.booleans()):
        fields["train__max_grad_norm"] = 1.0
    if draw(st.booleans()):
        fields["train__weight_decay"] = 0.1
    if method == "qlora":
        fields["quantization__double_quant"] = draw(st.booleans())
        fields["quantization__kbit_preparation"] = draw(st.booleans())
        fields["quantization__type"] = draw(st.sampled_from(["nf4", "int8"]))
    if method in ("lora", "qlora"):
        fields["lora__dtype"] = draw(st.sampled_from(["float32", "bfloat16"]))
        fields["lora__dropout"] = draw(st.sampled_from([0.0] if family == "mixtral" else [0.0, 0.1]))
    with_head = False
    if method == "lora" and family not in (*WITHOUT_PROJECTIONS, *ONLY_BFLOAT16):
        names = ("q_proj", "v_proj", "down_proj", "lm_head")
        if family == "bert":
            names = ("query", "value", "output.dense", "decoder")
        query, value, down, head = names
        targets = draw(st.sampled_from(["all-linear", f"[{query},{value}]", f"[{query},{down},{head}]"]))
        with_head = head in targets
        fields[HEADS] = targets
    if method == "npt":
        fields |= {"npt__rank": 4, CKPT: "none"}
    elif not (method == "qlora" and family.startswith("falcon")) and draw(st.booleans()):
        fields["loop"] = "script"
    elif not with_head and family != "bert" and draw(st.booleans()):
        fields["loss"] = "chunked"
    return family, job(**fields)


@settings(max_examples=int(os.environ.get("MEMPLAN_EXAMPLES", "6")), derandomize=True)
@given(jobs())
def test_any_job_is_planned_as_it_is_traced(drawn: tuple[str, Job]) -> None:
    model, drawn_job = drawn
    assert_equal(compare(drawn_job, CONFIGS[model]), ordered=model not in UNORDERED)
