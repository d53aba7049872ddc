"""Gemma 1, 2 and 3, text only (transformers/models/{gemma,gemma2,gemma3})."""

from __future__ import annotations

from typing import Any

from memplan.model.architecture import Architecture, Buffer
from memplan.model.families.layout import Layout, Module, decoder_layout, rotary_buffers
from memplan.model.keys import Keys


def _gemma_sizes(
    keys: Keys, *, heads: int, key_value_heads: int, vocab_size: int, max_position_embeddings: int
) -> dict[str, Any]:
    """What the three share; `head_dim` is 256 whatever the other sizes are."""
    heads = keys.size("num_attention_heads", default=heads)
    key_value_heads = keys.size("num_key_value_heads", default=key_value_heads)
    keys.must_divide("num_key_value_heads", key_value_heads, "num_attention_heads", heads)
    head_dim = keys.size("head_dim", default=256)
    keys.must_be_even("head_dim", head_dim)
    keys.refuse("use_bidirectional_attention")
    bias = keys.flag("attention_bias", False)
    return {
        "hidden_size": keys.size("hidden_size"),
        "intermediate_size": keys.size("intermediate_size"),
        "num_hidden_layers": keys.size("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "vocab_size": keys.size("vocab_size", default=vocab_size),
        "max_position_embeddings": keys.size("max_position_embeddings", default=max_position_embeddings),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", True),
        "attention_bias": bias,
        "attention_output_bias": bias,
        "attention_dropout": keys.probability("attention_dropout", 0.0),
    }


def _gemma(keys: Keys) -> dict[str, Any]:
    """`gelu` of the first configs means the tanh approximation, as `gelu_pytorch_tanh` does."""
    sizes = _gemma_sizes(keys, heads=16, key_value_heads=16, vocab_size=256000, max_position_embeddings=8192)
    hidden_act = keys.text("hidden_act", "gelu_pytorch_tanh")
    return {
        "family": "gemma",
        **sizes,
        "hidden_act": "gelu_pytorch_tanh" if hidden_act == "gelu" else hidden_act,
    }


def _gemma2(keys: Keys) -> dict[str, Any]:
    """Every second block slides, the first one too."""
    sizes = _gemma_sizes(keys, heads=8, key_value_heads=4, vocab_size=256000, max_position_embeddings=8192)
    return {
        "family": "gemma2",
        **sizes,
        "hidden_act": keys.text("hidden_activation", "gelu_pytorch_tanh"),
        **_window(keys, sizes["num_hidden_layers"], 2),
        "attn_logit_softcapping": keys.optional_number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.optional_number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    """Of `sliding_window_pattern` blocks the last one does not slide. Caps of attention are read and not used there."""
    sizes = _gemma_sizes(keys, heads=8, key_value_heads=4, vocab_size=262208, max_position_embeddings=131072)
    pattern = keys.size("sliding_window_pattern", default=6)
    return {
        "family": "gemma3_text",
        **sizes,
        "hidden_act": keys.text("hidden_activation", "gelu_pytorch_tanh"),
        "qk_norm": True,
        **_window(keys, sizes["num_hidden_layers"], pattern),
        "final_logit_softcapping": keys.optional_number("final_logit_softcapping", None),
    }


def _window(keys: Keys, num_hidden_layers: int, pattern: int) -> dict[str, Any]:
    layer_types = keys.layer_types(num_hidden_layers) or tuple(
        "sliding_attention" if (layer + 1) % pattern else "full_attention"
        for layer in range(num_hidden_layers)
    )
    all_slide = set(layer_types) == {"sliding_attention"}
    return {
        "sliding_window": keys.size("sliding_window", default=4096),
        "layer_types": () if all_slide else layer_types,
    }


READERS = {"gemma": _gemma, "gemma2": _gemma2, "gemma3_text": _gemma3}


def layout(architecture: Architecture) -> Layout:
    hidden_size, intermediate_size = architecture.hidden_size, architecture.intermediate_size
    head_dim, bias = architecture.head_dim, architecture.attention_bias
    query_size = architecture.num_attention_heads * head_dim
    key_value_size = architecture.num_key_value_heads * head_dim
    modules = [
        Module("self_attn.q_proj", "linear", (query_size, hidden_size), bias=bias),
        Module("self_attn.k_proj", "linear", (key_value_size, hidden_size), bias=bias),
        Module("self_attn.v_proj", "linear", (key_value_size, hidden_size), bias=bias),
        Module("self_attn.o_proj", "linear", (hidden_size, query_size), bias=bias),
    ]
    if architecture.qk_norm:
        modules += [
            Module("self_attn.q_norm", "norm", (head_dim,)),
            Module("self_attn.k_norm", "norm", (head_dim,)),
        ]
    modules += [
        Module("mlp.gate_proj", "linear", (intermediate_size, hidden_size)),
        Module("mlp.up_proj", "linear", (intermediate_size, hidden_size)),
        Module("mlp.down_proj", "linear", (hidden_size, intermediate_size)),
        Module("input_layernorm", "norm", (hidden_size,)),
        Module("post_attention_layernorm", "norm", (hidden_size,)),
    ]
    if architecture.family != "gemma":
        modules += [
            Module("pre_feedforward_layernorm", "norm", (hidden_size,)),
            Module("post_feedforward_layernorm", "norm", (hidden_size,)),
        ]
    tables = [f"{kind}_" for kind in architecture.attention_kinds] if architecture.qk_norm else []
    buffers = (
        Buffer("model.embed_tokens.embed_scale", (), None, None),
        *rotary_buffers(head_dim, *tables),
    )
    return decoder_layout(hidden_size, architecture.vocab_size, tuple(modules), buffers)
