"""Packages whose kernels need a GPU: stand-ins that allocate as they do, in the trace and so in the shape writer."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from memplan.errors import TraceError
from memplan.tracing.estimate import estimate_traced
from memplan.tracing.writer import trace_job
from tracing.comparison import compare
from tracing.tiny import CONFIGS, job

FA2 = {"attention": "flash_attention_2"}
FUSED = {"loss": "fused"}
LOW = {"dtype": "float32", "autocast": "bfloat16"}
LORA = {"method": "lora"}

MOE = {
    key: value for key, value in CONFIGS["llama"].items() if key not in ("model_type", "architectures")
} | {"num_experts_per_tok": 2, "num_hidden_layers": 3}
MIXTRAL = MOE | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
}

JOBS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (CONFIGS["llama"], FA2),
    (CONFIGS["llama"], FA2 | LORA | LOW),
    (CONFIGS["qwen3"], FA2 | {"loop": "script", "lora__dtype": "bfloat16"} | LORA),
    (CONFIGS["mistral, sliding"], FA2 | {"gradient_accumulation_steps": 2}),
    (CONFIGS["llama"], FUSED),
    (CONFIGS["llama"], FUSED | LORA | LOW),
    (CONFIGS["llama"], FUSED | LOW),
    (CONFIGS["llama"], FUSED | {"dtype": "float32", "activation_checkpointing": "full"}),
    (MIXTRAL, {"dtype": "float32"}),
    (MIXTRAL, LOW | LORA | {"lora__target_modules": "[q_proj]"}),
]


@pytest.mark.parametrize(("config", "fields"), JOBS)
def test_both_writers_allocate_as_the_package_does(config: dict[str, Any], fields: dict[str, Any]) -> None:
    both = compare(job(**fields), config)
    assert both.lifetimes(both.shape) == both.lifetimes(both.trace), both.first_difference()
    assert both.peaks()[0] == both.peaks()[1]


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("llama", FA2 | LORA | {"packing": True, "activation_checkpointing": "full"}),
        ("gpt2", FA2 | {"activation_checkpointing": "selective"}),
    ],
)
def test_documents_in_one_row_and_recomputation_peak_alike(model: str, fields: dict[str, Any]) -> None:
    """Where documents begin takes a few KiB that are not planned; a recomputed block lets go in another order."""
    shape, trace = compare(job(**fields), CONFIGS[model]).peaks()
    assert abs(shape / trace - 1) < 0.001


def test_the_chunks_of_the_fused_loss_are_as_large_as_the_hidden_states() -> None:
    """Here 16 of 256 tokens: 1000 logits each instead of 64 hidden channels."""
    traced = trace_job(job(**FUSED), CONFIGS["llama"])
    shapes = {traced.describe(index).shape for index in range(1, 800)}
    assert (16, 1000) in shapes and not any(shape and shape[-2:] == (128, 1000) for shape in shapes)


def test_a_loop_that_leaves_the_loss_to_the_model_is_refused() -> None:
    with pytest.raises(TraceError, match="`loss: fused` with `loop: script`"):
        trace_job(job(loop="script", **FUSED), CONFIGS["llama"])


def test_what_the_model_itself_cannot_do_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no such operation\nand a long explanation")

    monkeypatch.setattr(torch.nn.functional, "embedding", broken)
    with pytest.raises(TraceError, match=r"on meta tensors: NotImplementedError: no such operation$"):
        estimate_traced(job(), CONFIGS["llama"])


def test_nothing_of_them_is_left() -> None:
    """Nor of the functions that transformers keeps once it has loaded flash-attn."""
    import transformers.modeling_flash_attention_utils as module

    before = dict(vars(module))
    trace_job(job(**FA2, **FUSED), CONFIGS["llama"])
    assert before == vars(module)
    assert "liger_kernel" not in sys.modules
