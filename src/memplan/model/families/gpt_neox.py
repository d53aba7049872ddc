"""GPT-NeoX and Pythia (transformers/models/gpt_neox)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.model.architecture import Architecture
from memplan.model.families.layout import Layout, Module, rotary_buffers
from memplan.model.keys import Keys


def _gpt_neox(keys: Keys) -> dict[str, Any]:
    hidden_size = keys.size("hidden_size", default=6144)
    heads = keys.size("num_attention_heads", default=64)
    keys.must_divide("num_attention_heads", heads, "hidden_size", hidden_size)
    head_dim = hidden_size // heads
    bias = keys.flag("attention_bias", True)
    rotary_dim = int(head_dim * _rotary_share(keys))
    keys.must_be_even("rotary_pct * head_dim", rotary_dim)
    return {
        "family": "gpt_neox",
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("intermediate_size", default=24576),
        "num_hidden_layers": keys.size("num_hidden_layers", default=44),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "vocab_size": keys.size("vocab_size"),
        "max_position_embeddings": keys.size("max_position_embeddings", default=2048),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", False),
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": True,
        "hidden_act": keys.text("hidden_act", "gelu"),
        "attention_dropout": keys.probability("attention_dropout", 0.0),
        "residual_dropout": keys.probability("hidden_dropout", 0.0),
        "embedding_dropout": keys.probability("hidden_dropout", 0.0),
        "rotary_dim": rotary_dim,
        "parallel_residual": keys.flag("use_parallel_residual", True),
    }


def _rotary_share(keys: Keys) -> float:
    """`partial_rotary_factor` in files of transformers 5, `rotary_pct` in older ones."""
    rotary = keys.mapping("rope_parameters")
    if isinstance(rotary, Mapping) and "partial_rotary_factor" in rotary:
        return float(rotary["partial_rotary_factor"])
    return keys.share("rotary_pct", 0.25)


READERS = {"gpt_neox": _gpt_neox}


def layout(architecture: Architecture) -> Layout:
    hidden_size, intermediate_size = architecture.hidden_size, architecture.intermediate_size
    bias = architecture.attention_bias
    assert architecture.rotary_dim is not None
    return Layout(
        before=(Module("gpt_neox.embed_in", "embedding", (architecture.vocab_size, hidden_size)),),
        block_prefix="gpt_neox.layers",
        block=(
            Module("input_layernorm", "norm", (hidden_size,), bias=True),
            Module("post_attention_layernorm", "norm", (hidden_size,), bias=True),
            Module("attention.query_key_value", "linear", (3 * hidden_size, hidden_size), bias=bias),
            Module("attention.dense", "linear", (hidden_size, hidden_size), bias=bias),
            Module("mlp.dense_h_to_4h", "linear", (intermediate_size, hidden_size), bias=True),
            Module("mlp.dense_4h_to_h", "linear", (hidden_size, intermediate_size), bias=True),
        ),
        after=(
            Module("gpt_neox.final_layer_norm", "norm", (hidden_size,), bias=True),
            Module("lm_head", "head", (architecture.vocab_size, hidden_size)),
        ),
        buffers=rotary_buffers(architecture.rotary_dim, model="gpt_neox"),
    )
