"""GPT-BigCode: SantaCoder and StarCoder (transformers/models/gpt_bigcode)."""

from __future__ import annotations

from typing import Any

from memplan.model.architecture import Architecture, Buffer
from memplan.model.families.layout import Layout, Module
from memplan.model.keys import Keys


def _gpt_bigcode(keys: Keys) -> dict[str, Any]:
    keys.refuse("add_cross_attention")
    hidden_size = keys.size("n_embd", "hidden_size", default=768)
    heads = keys.size("n_head", "num_attention_heads", default=12)
    keys.must_divide("n_head", heads, "n_embd", hidden_size)
    return {
        "family": "gpt_bigcode",
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("n_inner", default=4 * hidden_size),
        "num_hidden_layers": keys.size("n_layer", "num_hidden_layers", default=12),
        "num_attention_heads": heads,
        "num_key_value_heads": 1 if keys.flag("multi_query", True) else heads,
        "head_dim": hidden_size // heads,
        "vocab_size": keys.size("vocab_size", default=50257),
        "max_position_embeddings": keys.size("n_positions", "max_position_embeddings", default=1024),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", True),
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "hidden_act": keys.text("activation_function", "gelu_pytorch_tanh"),
        "attention_dropout": keys.probability("attn_pdrop", 0.1),
        "residual_dropout": keys.probability("resid_pdrop", 0.1),
        "embedding_dropout": keys.probability("embd_pdrop", 0.1),
    }


READERS = {"gpt_bigcode": _gpt_bigcode}


def layout(architecture: Architecture) -> Layout:
    """The causal mask of all positions is a buffer still, though nothing reads it."""
    hidden_size, intermediate_size = architecture.hidden_size, architecture.intermediate_size
    vocab_size, length = architecture.vocab_size, architecture.max_position_embeddings
    projected = hidden_size + 2 * architecture.num_key_value_heads * architecture.head_dim
    return Layout(
        before=(
            Module("transformer.wte", "embedding", (vocab_size, hidden_size)),
            Module("transformer.wpe", "embedding", (length, hidden_size)),
        ),
        block_prefix="transformer.h",
        block=(
            Module("ln_1", "norm", (hidden_size,), bias=True),
            Module("attn.c_attn", "linear", (projected, hidden_size), bias=True),
            Module("attn.c_proj", "linear", (hidden_size, hidden_size), bias=True),
            Module("ln_2", "norm", (hidden_size,), bias=True),
            Module("mlp.c_fc", "linear", (intermediate_size, hidden_size), bias=True),
            Module("mlp.c_proj", "linear", (hidden_size, intermediate_size), bias=True),
        ),
        after=(
            Module("transformer.ln_f", "norm", (hidden_size,), bias=True),
            Module("lm_head", "head", (vocab_size, hidden_size)),
        ),
        buffers=(Buffer("transformer.bias", (length, length), "bool", None),),
    )
