"""Falcon 7B, 40B and 180B (transformers/models/falcon); not those with ALiBi."""

from __future__ import annotations

from typing import Any

from memplan.model.architecture import Architecture
from memplan.model.families.layout import Layout, Module, rotary_buffers
from memplan.model.keys import Keys


def _falcon(keys: Keys) -> dict[str, Any]:
    keys.refuse("alibi")
    keys.refuse("bias")
    grouped = keys.flag("new_decoder_architecture", False)
    if not grouped:
        keys.must_be("parallel_attn", True)
        keys.must_be("multi_query", True)
    hidden_size = keys.size("hidden_size", "n_embed", default=4544)
    heads = keys.size("num_attention_heads", default=71)
    keys.must_divide("num_attention_heads", heads, "hidden_size", hidden_size)
    keys.must_be_even("head_dim", hidden_size // heads)
    key_value_heads = keys.size("num_kv_heads", default=heads) if grouped else 1
    keys.must_divide("num_kv_heads", key_value_heads, "num_attention_heads", heads)
    return {
        "family": "falcon",
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("ffn_hidden_size", default=4 * hidden_size),
        "num_hidden_layers": keys.size("num_hidden_layers", default=32),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": hidden_size // heads,
        "vocab_size": keys.size("vocab_size", default=65024),
        "max_position_embeddings": keys.size("max_position_embeddings", default=2048),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", True),
        "hidden_act": keys.text("activation", "gelu"),
        "residual_dropout": keys.probability("hidden_dropout", 0.0),
        "parallel_residual": True,
        "grouped_projection": grouped,
        "separate_norms": keys.size("num_ln_in_parallel_attn", default=2 if grouped else 1) == 2,
    }


READERS = {"falcon": _falcon}


def layout(architecture: Architecture) -> Layout:
    hidden_size, intermediate_size = architecture.hidden_size, architecture.intermediate_size
    vocab_size, head_dim = architecture.vocab_size, architecture.head_dim
    projected = hidden_size + 2 * architecture.num_key_value_heads * head_dim
    norms = ("ln_attn", "ln_mlp") if architecture.separate_norms else ("input_layernorm",)
    return Layout(
        before=(Module("transformer.word_embeddings", "embedding", (vocab_size, hidden_size)),),
        block_prefix="transformer.h",
        block=(
            Module("self_attention.query_key_value", "linear", (projected, hidden_size)),
            Module("self_attention.dense", "linear", (hidden_size, hidden_size)),
            Module("mlp.dense_h_to_4h", "linear", (intermediate_size, hidden_size)),
            Module("mlp.dense_4h_to_h", "linear", (hidden_size, intermediate_size)),
            *(Module(name, "norm", (hidden_size,), bias=True) for name in norms),
        ),
        after=(
            Module("transformer.ln_f", "norm", (hidden_size,), bias=True),
            Module("lm_head", "head", (vocab_size, hidden_size)),
        ),
        buffers=rotary_buffers(head_dim, model="transformer"),
    )
