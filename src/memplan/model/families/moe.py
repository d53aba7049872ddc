"""Mixtral and Qwen3-MoE (transformers/models/{mixtral,qwen3_moe}): the experts of a block are stacked parameters."""

from __future__ import annotations

from typing import Any

from memplan.model.architecture import Architecture
from memplan.model.families.layout import Layout, Module, decoder_layout, rotary_buffers
from memplan.model.families.llama import attention_modules, decoder_sizes
from memplan.model.keys import Keys


def _mixtral(keys: Keys) -> dict[str, Any]:
    keys.must_be("router_jitter_noise", 0.0)
    sizes = decoder_sizes(keys, key_value_heads=8, head_dim=None, max_position_embeddings=131072)
    return {
        "family": "mixtral",
        **sizes,
        **_experts(keys, "num_local_experts", "num_experts", default=8, chosen=2),
        "sliding_window": keys.optional_size("sliding_window", None),
    }


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    """Blocks without experts (`mlp_only_layers`, `decoder_sparse_step`) have no program."""
    keys.refuse("mlp_only_layers")
    keys.must_be("decoder_sparse_step", 1)
    sizes = decoder_sizes(keys, key_value_heads=4, head_dim=None, max_position_embeddings=32768)
    bias = keys.flag("attention_bias", False)
    return {
        "family": "qwen3_moe",
        **sizes,
        "intermediate_size": keys.size("moe_intermediate_size", default=768),
        **_experts(keys, "num_experts", "num_local_experts", default=128, chosen=8),
        "normalized_routing": keys.flag("norm_topk_prob", False),
        "attention_bias": bias,
        "attention_output_bias": bias,
        "qk_norm": True,
    }


def _experts(keys: Keys, *names: str, default: int, chosen: int) -> dict[str, Any]:
    num_experts = keys.size(*names, default=default)
    per_token = keys.size("num_experts_per_tok", default=chosen)
    keys.must_not_exceed("num_experts_per_tok", per_token, names[0], num_experts)
    return {"num_experts": num_experts, "experts_per_token": per_token}


READERS = {"mixtral": _mixtral, "qwen3_moe": _qwen3_moe}


def layout(architecture: Architecture) -> Layout:
    """
    Parameters of the experts have no `.weight` in their names. peft 0.21 gives them and the router adapters where the
    names that they had in transformers 4 are targeted, `all-linear` included (its transformers_weight_conversion.py).
    """
    hidden_size, num_experts = architecture.hidden_size, architecture.num_experts
    width = architecture.intermediate_size
    mixtral = architecture.family == "mixtral"
    gate_up, down = (("w1", "w3"), ("w2",)) if mixtral else (("gate_proj", "up_proj"), ("down_proj",))
    router = Module("mlp.gate", "router", (num_experts, hidden_size), adapter_names=("gate",))
    experts = [
        Module(
            "mlp.experts.gate_up_proj",
            "experts",
            (num_experts, 2 * width, hidden_size),
            adapter_names=gate_up,
        ),
        Module("mlp.experts.down_proj", "experts", (num_experts, hidden_size, width), adapter_names=down),
    ]
    block = (
        *attention_modules(architecture),
        *([router, *experts] if mixtral else [*experts, router]),
        Module("input_layernorm", "norm", (hidden_size,)),
        Module("post_attention_layernorm", "norm", (hidden_size,)),
    )
    return decoder_layout(hidden_size, architecture.vocab_size, block, rotary_buffers(architecture.head_dim))
