"""OLMo 1, 2 and 3 (transformers/models/{olmo,olmo2,olmo3})."""

from __future__ import annotations

from typing import Any

from memplan.model.architecture import Architecture
from memplan.model.families.layout import Layout, Module, decoder_layout, rotary_buffers
from memplan.model.families.llama import decoder_sizes
from memplan.model.keys import Keys


def _olmo_sizes(keys: Keys) -> dict[str, Any]:
    sizes = decoder_sizes(keys, key_value_heads=None, head_dim=None, max_position_embeddings=2048)
    bias = keys.flag("attention_bias", False)
    return {**sizes, "attention_bias": bias, "attention_output_bias": bias}


def _olmo(keys: Keys) -> dict[str, Any]:
    return {"family": "olmo", **_olmo_sizes(keys), "clip_qkv": keys.optional_number("clip_qkv", None)}


def _olmo2(keys: Keys) -> dict[str, Any]:
    return {"family": "olmo2", **_olmo_sizes(keys), "qk_norm": True}


def _olmo3(keys: Keys) -> dict[str, Any]:
    """Of four blocks the last one does not slide."""
    sizes = _olmo_sizes(keys)
    layer_types = keys.layer_types(sizes["num_hidden_layers"]) or tuple(
        "sliding_attention" if (layer + 1) % 4 else "full_attention"
        for layer in range(sizes["num_hidden_layers"])
    )
    return {
        "family": "olmo3",
        **sizes,
        "qk_norm": True,
        "sliding_window": keys.size("sliding_window", default=4096),
        "layer_types": () if set(layer_types) == {"sliding_attention"} else layer_types,
    }


READERS = {"olmo": _olmo, "olmo2": _olmo2, "olmo3": _olmo3}


def layout(architecture: Architecture) -> Layout:
    """The norms of OLMo 1 have no weights; those of 2 and 3 on q and k go over all heads at once."""
    hidden_size, intermediate_size = architecture.hidden_size, architecture.intermediate_size
    bias, head_dim = architecture.attention_bias, architecture.head_dim
    query_size = architecture.num_attention_heads * head_dim
    key_value_size = architecture.num_key_value_heads * head_dim
    projections = (
        Module("self_attn.q_proj", "linear", (query_size, hidden_size), bias=bias),
        Module("self_attn.k_proj", "linear", (key_value_size, hidden_size), bias=bias),
        Module("self_attn.v_proj", "linear", (key_value_size, hidden_size), bias=bias),
        Module("self_attn.o_proj", "linear", (hidden_size, query_size), bias=bias),
    )
    feed_forward = (
        Module("mlp.gate_proj", "linear", (intermediate_size, hidden_size)),
        Module("mlp.up_proj", "linear", (intermediate_size, hidden_size)),
        Module("mlp.down_proj", "linear", (hidden_size, intermediate_size)),
    )
    vocab_size = architecture.vocab_size
    if architecture.family == "olmo":
        return decoder_layout(
            hidden_size, vocab_size, (*projections, *feed_forward), rotary_buffers(head_dim), final_norm=()
        )
    block = (
        *projections,
        Module("self_attn.q_norm", "norm", (query_size,)),
        Module("self_attn.k_norm", "norm", (key_value_size,)),
        *feed_forward,
        Module("post_attention_layernorm", "norm", (hidden_size,)),
        Module("post_feedforward_layernorm", "norm", (hidden_size,)),
    )
    tables = [f"{kind}_" for kind in architecture.attention_kinds] if architecture.family == "olmo3" else []
    return decoder_layout(hidden_size, vocab_size, block, rotary_buffers(head_dim, *tables))
