"""Architectures without a program: those that transformers builds otherwise than a Llama, and what no job trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memplan.cli.planning import plan, read_job
from memplan.errors import MemplanError, NoSuchAttention, TraceError, UnknownModel
from memplan.tracing.estimate import estimate_traced
from memplan.tracing.writer import trace_job
from tracing.tiny import CONFIGS, job

SIZES = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 32, **SIZES,
}  # fmt: skip
LLAMA4 = {
    "model_type": "llama4_text", "architectures": ["Llama4ForConditionalGeneration"], "intermediate_size_mlp": 96,
    "num_local_experts": 4, "num_experts_per_tok": 1, **SIZES,
}  # fmt: skip
GEMMA4 = {
    "model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], "num_kv_shared_layers": 2,
    "global_head_dim": 16, "vocab_size_per_layer_input": 1000, "hidden_size_per_layer_input": 16, "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2, **SIZES,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "vit"}, "no causal language model of the type `vit`"),
        ({"model_type": "t5"}, "no causal language model of the type `t5`"),
        (
            {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
            "an encoder with a decoder",
        ),
        (CONFIGS["llama"] | {"quantization_config": {"quant_method": "fp8"}}, r"stored quantised \(fp8\)"),
        ({"model_type": "never_heard_of"}, "knows no model type `never_heard_of`"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_no_job_trains_is_refused(config: dict[str, Any], sentence: str) -> None:
    """None of them may be planned as something else that transformers can build of the same config."""
    with pytest.raises(UnknownModel, match=sentence) as refusal:
        trace_job(job(), config)
    assert refusal.value.hint


def test_attention_that_a_model_lacks(tmp_path: Path) -> None:
    """It is refused where the job names it; where it is only the default, eager attention is planned, and said."""
    with pytest.raises(NoSuchAttention, match="GptOssForCausalLM has no `attention: sdpa`"):
        trace_job(job(), GPT_OSS)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT_OSS))
    asked = [f"model={path}", "max_seq_len=64", "method=full"]
    planned = plan(read_job(None, asked, {}))
    assert any(
        "`attention: eager`, as transformers' GptOss" in warning for warning in planned.result.warnings
    )
    assert planned.result.job is not None and "eager" == planned.result.job.attention
    with pytest.raises(MemplanError, match="has no `attention: sdpa`"):
        plan(read_job(None, [*asked, "attention=sdpa"], {}))


def test_the_text_part_of_a_multimodal_model() -> None:
    """Its decoder is not under the prefix that its class has from the whole."""
    _, result = estimate_traced(job(max_seq_len=64), LLAMA4)
    assert any("no measured run was of Llama4ForCausalLM" in note for note in result.warnings)
    assert any("names Llama4ForConditionalGeneration; Llama4ForCausalLM" in note for note in result.warnings)


def test_blocks_that_need_each_other_are_all_traced() -> None:
    """The last blocks of Gemma 4 take keys and values of others, which a few blocks alone do not have."""
    asked = job(max_seq_len=64)
    assert trace_job(asked, GEMMA4).flatten() == trace_job(asked, GEMMA4, whole=True).flatten()


def test_a_loss_that_our_loop_does_not_take() -> None:
    config = {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "logits_scaling": 8.0,
        **SIZES,
    }
    with pytest.raises(
        TraceError, match=r"`memplan train` cannot train this job.*`logits_scaling`"
    ) as refusal:
        trace_job(job(), config)
    assert "loop=hf_trainer" in (refusal.value.hint or "")
    assert trace_job(job(loop="hf_trainer", max_seq_len=64), config).flatten().events
