"""Attention's kernels in both writers: the same choice on every card, the same events, the same words."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.errors import JobError
from memplan.model import architecture_from_config
from memplan.tape.writer import write_tape
from memplan.tracing.writer import trace_job
from tracing.comparison import compare
from tracing.tiny import CONFIGS, job

CKPT = "activation_checkpointing"

JOBS: list[tuple[str, str, dict[str, Any]]] = [
    ("cudnn", "llama", {"gpu": "H100"}),
    ("cudnn", "llama", {"gpu": "B200", "method": "lora", CKPT: "full", "lora__dtype": "bfloat16"}),
    ("cudnn", "qwen2", {"gpu": "H200", "method": "npt", "npt__rank": 4}),
    ("cudnn", "gpt2", {"gpu": "H100", "micro_batch_size": 1, "dtype": "float32", "autocast": "bfloat16"}),
    ("cudnn", "llama", {"gpu": "H100", "packing": True, "max_seq_len": 100}),
    ("cudnn", "mistral, sliding", {"gpu": "H100", "method": "lora"}),
    ("flash", "llama", {"gpu": "H100", "attention_kernel": "flash"}),
    ("efficient", "llama, as many key heads", {"gpu": "RTX 4090", "attention_kernel": "efficient"}),
    ("math", "llama", {"gpu": "A100", "attention_kernel": "math", CKPT: "selective"}),
    ("math", "llama", {"gpu": "Tesla T4"}),
    ("math", "llama", {"gpu": "Tesla T4", "dtype": "float16"}),
]


@pytest.mark.parametrize(("kernel", "model", "fields"), JOBS, ids=str)
def test_both_writers_run_the_same_kernel(kernel: str, model: str, fields: dict[str, Any]) -> None:
    both = compare(job(**fields), CONFIGS[model])
    assert {kernel} == both.shape.graph.target.kernels == both.trace.target.kernels  # type: ignore[attr-defined]
    assert both.lifetimes(both.shape) == both.lifetimes(both.trace), both.first_difference()
    assert both.num_small(both.shape) == both.num_small(both.trace)
    assert both.memory(both.shape) == both.memory(both.trace)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("llama", {"attention_kernel": "efficient"}),
        ("llama", {"attention_kernel": "flash", "dtype": "float32"}),
        ("mistral, sliding", {"attention_kernel": "flash"}),
    ],
)
def test_both_writers_refuse_alike(model: str, fields: dict[str, Any]) -> None:
    question, config = job(**fields), CONFIGS[model]
    sentences = []
    for write in (
        lambda: write_tape(question, architecture_from_config(config, name="tiny", source="test")),
        lambda: trace_job(question, config),
    ):
        with pytest.raises(JobError) as refusal:
            write()
        sentences.append((refusal.value.message, refusal.value.hint))
    assert sentences[0] == sentences[1]
    assert sentences[0][0].startswith(f"`attention_kernel: {fields['attention_kernel']}`")


def test_a_cpu_runs_the_kernel_that_is_named() -> None:
    """And the composite one holds all scores."""
    plain, composite = (
        compare(job(attention_kernel=kernel, dtype="float32"), CONFIGS["llama"], device="cpu")
        for kernel in ("auto", "math")
    )
    assert {"math"} == composite.trace.target.kernels  # type: ignore[attr-defined]
    assert composite.peaks()[0] > plain.peaks()[0]
    assert composite.lifetimes(composite.shape) == composite.lifetimes(composite.trace)


LATENT = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 1000, "hidden_size": 64,
    "intermediate_size": 176, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


def test_values_may_have_narrower_heads_than_queries() -> None:
    """As DeepSeek's have, which flash does not take and the memory-efficient kernel does."""
    traced = trace_job(job(gpu="A100", max_seq_len=64, micro_batch_size=1), LATENT)
    assert {"efficient"} == traced.target.kernels
    made = [traced.describe(number) for number in range(1, len(traced.categories()))]
    outputs = [
        storage for storage in made if storage.where.endswith("_efficient_attention") and storage.shape
    ]
    assert {"bfloat16": (1, 4, 64, 16), "float32": (1, 4, 64)} == {
        storage.dtype: storage.shape for storage in outputs
    }
