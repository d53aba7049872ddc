"""Phi-3, Phi-3.5 and Phi-4, text only (transformers/models/phi3)."""

from __future__ import annotations

from typing import Any

from memplan.model.architecture import Architecture
from memplan.model.families.layout import Layout, Module, decoder_layout, rotary_buffers
from memplan.model.families.llama import decoder_sizes
from memplan.model.keys import Keys


def _phi3(keys: Keys) -> dict[str, Any]:
    sizes = decoder_sizes(keys, key_value_heads=None, head_dim=None, max_position_embeddings=4096)
    head_dim = sizes["head_dim"]
    return {
        "family": "phi3",
        **sizes,
        "sliding_window": keys.optional_size("sliding_window", None),
        "rotary_dim": int(head_dim * _partial_rotary_factor(keys)),
        "residual_dropout": keys.probability("resid_pdrop", 0.0),
    }


def _partial_rotary_factor(keys: Keys) -> float:
    """Beside the other sizes in files of transformers 4, in `rope_parameters` in those of 5."""
    factor = keys.section("rope_parameters", "rope_scaling").optional_number("partial_rotary_factor", None)
    return factor or keys.optional_number("partial_rotary_factor", 1.0) or 1.0


READERS = {"phi3": _phi3}


def layout(architecture: Architecture) -> Layout:
    hidden_size, intermediate_size = architecture.hidden_size, architecture.intermediate_size
    query_size = architecture.num_attention_heads * architecture.head_dim
    key_value_size = architecture.num_key_value_heads * architecture.head_dim
    block = (
        Module("self_attn.o_proj", "linear", (hidden_size, query_size)),
        Module("self_attn.qkv_proj", "linear", (query_size + 2 * key_value_size, hidden_size)),
        Module("mlp.gate_up_proj", "linear", (2 * intermediate_size, hidden_size)),
        Module("mlp.down_proj", "linear", (hidden_size, intermediate_size)),
        Module("input_layernorm", "norm", (hidden_size,)),
        Module("post_attention_layernorm", "norm", (hidden_size,)),
    )
    buffers = rotary_buffers(architecture.rotary_dim or architecture.head_dim)
    return decoder_layout(hidden_size, architecture.vocab_size, block, buffers)
