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
