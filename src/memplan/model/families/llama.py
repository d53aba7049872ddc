"""Llama, Mistral, Qwen2, Qwen3 and Granite (transformers/models/{llama,mistral,qwen2,qwen3,granite})."""

from __future__ import annotations

from typing import Any

from memplan.model.architecture import Architecture
from memplan.model.families.layout import Layout, Module, decoder_layout, rotary_buffers
from memplan.model.keys import Keys


def decoder_sizes(
    keys: Keys,
    *,
    key_value_heads: int | None,
    head_dim: int | None,
    max_position_embeddings: int,
) -> dict[str, Any]:
    """What Llama, Mistral, Qwen and Granite share; the arguments are defaults of absent keys, None for derived."""
    hidden_size = keys.size("hidden_size")
    heads = keys.size("num_attention_heads")
    head_dim = keys.optional_size("head_dim", head_dim)
    if head_dim is None:
        keys.must_divide("num_attention_heads", heads, "hidden_size", hidden_size)
        head_dim = hidden_size // heads
    keys.must_be_even("head_dim", head_dim)
    key_value_heads = keys.optional_size("num_key_value_heads", key_value_heads) or heads
    keys.must_divide("num_key_value_heads", key_value_heads, "num_attention_heads", heads)
    return {
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("intermediate_size"),
        "num_hidden_layers": keys.size("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "vocab_size": keys.size("vocab_size"),
        "max_position_embeddings": keys.size("max_position_embeddings", default=max_position_embeddings),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", False),
        "hidden_act": keys.text("hidden_act", "silu"),
        "attention_dropout": keys.probability("attention_dropout", 0.0),
    }


def _llama(keys: Keys) -> dict[str, Any]:
    sizes = decoder_sizes(keys, key_value_heads=None, head_dim=None, max_position_embeddings=2048)
    keys.must_divide("num_attention_heads", sizes["num_attention_heads"], "hidden_size", sizes["hidden_size"])
    bias = keys.flag("attention_bias", False)
    return {
        "family": "llama",
        **sizes,
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": keys.flag("mlp_bias", False),
    }


def _mistral(keys: Keys) -> dict[str, Any]:
    sizes = decoder_sizes(keys, key_value_heads=8, head_dim=None, max_position_embeddings=131072)
    return {"family": "llama", **sizes, "sliding_window": keys.optional_size("sliding_window", 4096)}


def _qwen2(keys: Keys) -> dict[str, Any]:
    sizes = decoder_sizes(keys, key_value_heads=32, head_dim=None, max_position_embeddings=32768)
    return {
        "family": "qwen2",
        **sizes,
        "attention_bias": True,
        **_qwen_window(keys, sizes["num_hidden_layers"]),
    }


def _qwen3(keys: Keys) -> dict[str, Any]:
    sizes = decoder_sizes(keys, key_value_heads=32, head_dim=128, max_position_embeddings=32768)
    bias = keys.flag("attention_bias", False)
    return {
        "family": "qwen3",
        **sizes,
        "attention_bias": bias,
        "attention_output_bias": bias,
        "qk_norm": True,
        **_qwen_window(keys, sizes["num_hidden_layers"]),
    }


def _granite(keys: Keys) -> dict[str, Any]:
    """Llama's layout; the multipliers beside that of the logits are numbers, and always there."""
    return {
        **_llama(keys),
        "family": "granite",
        "logits_scaling": keys.optional_number("logits_scaling", 1.0),
    }


def _qwen_window(keys: Keys, num_hidden_layers: int) -> dict[str, Any]:
    """Qwen slides only if `use_sliding_window`, and then in the blocks from `max_window_layers` on."""
    if not keys.flag("use_sliding_window", False):
        return {}
    window = keys.optional_size("sliding_window", 4096)
    if window is None:
        return {}
    first = keys.count("max_window_layers", 28)
    layer_types = keys.layer_types(num_hidden_layers) or tuple(
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_hidden_layers)
    )
    kinds = set(layer_types)
    if kinds == {"full_attention"}:
        return {}
    return {"sliding_window": window, "layer_types": layer_types if len(kinds) > 1 else ()}


READERS = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "granite": _granite}


def attention_modules(architecture: Architecture) -> list[Module]:
    """q, k, v and o, and norms of q and k where there are."""
    hidden_size, head_dim = architecture.hidden_size, architecture.head_dim
    query_size = architecture.num_attention_heads * head_dim
    key_value_size = architecture.num_key_value_heads * head_dim
    qkv_bias, output_bias = architecture.attention_bias, architecture.attention_output_bias
    modules = [
        Module("self_attn.q_proj", "linear", (query_size, hidden_size), bias=qkv_bias),
        Module("self_attn.k_proj", "linear", (key_value_size, hidden_size), bias=qkv_bias),
        Module("self_attn.v_proj", "linear", (key_value_size, hidden_size), bias=qkv_bias),
        Module("self_attn.o_proj", "linear", (hidden_size, query_size), bias=output_bias),
    ]
    if architecture.qk_norm:
        modules += [
            Module("self_attn.q_norm", "norm", (head_dim,)),
            Module("self_attn.k_norm", "norm", (head_dim,)),
        ]
    return modules


def layout(architecture: Architecture) -> Layout:
    hidden_size, intermediate_size = architecture.hidden_size, architecture.intermediate_size
    mlp_bias = architecture.mlp_bias
    block = (
        *attention_modules(architecture),
        Module("mlp.gate_proj", "linear", (intermediate_size, hidden_size), bias=mlp_bias),
        Module("mlp.up_proj", "linear", (intermediate_size, hidden_size), bias=mlp_bias),
        Module("mlp.down_proj", "linear", (hidden_size, intermediate_size), bias=mlp_bias),
        Module("input_layernorm", "norm", (hidden_size,)),
        Module("post_attention_layernorm", "norm", (hidden_size,)),
    )
    return decoder_layout(hidden_size, architecture.vocab_size, block, rotary_buffers(architecture.head_dim))
