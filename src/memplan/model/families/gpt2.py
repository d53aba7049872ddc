"""GPT-2 (transformers/models/gpt2)."""

from __future__ import annotations

from typing import Any

from memplan.model.architecture import Architecture
from memplan.model.families.layout import Layout, Module
from memplan.model.keys import Keys


def _gpt2(keys: Keys) -> dict[str, Any]:
    keys.refuse("add_cross_attention")
    keys.refuse("reorder_and_upcast_attn")
    hidden_size = keys.size("n_embd", "hidden_size")
    heads = keys.size("n_head", "num_attention_heads")
    keys.must_divide("n_head", heads, "n_embd", hidden_size)
    return {
        "family": "gpt2",
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("n_inner", default=4 * hidden_size),
        "num_hidden_layers": keys.size("n_layer", "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden_size // heads,
        "vocab_size": keys.size("vocab_size"),
        "max_position_embeddings": keys.size("n_positions", "max_position_embeddings", default=1024),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", True),
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "hidden_act": keys.text("activation_function", "gelu_new"),
        "attention_dropout": keys.probability("attn_pdrop", 0.1),
        "residual_dropout": keys.probability("resid_pdrop", 0.1),
        "embedding_dropout": keys.probability("embd_pdrop", 0.1),
    }


READERS = {"gpt2": _gpt2}


def layout(architecture: Architecture) -> Layout:
    """There are no buffers in transformers 5: the causal mask no longer is one."""
    hidden_size, intermediate_size = architecture.hidden_size, architecture.intermediate_size
    vocab_size = architecture.vocab_size
    return Layout(
        before=(
            Module("transformer.wte", "embedding", (vocab_size, hidden_size)),
            Module("transformer.wpe", "embedding", (architecture.max_position_embeddings, hidden_size)),
        ),
        block_prefix="transformer.h",
        block=(
            Module("ln_1", "norm", (hidden_size,), bias=True),
            Module("attn.c_attn", "linear", (hidden_size, 3 * hidden_size), bias=True, transposed=True),
            Module("attn.c_proj", "linear", (hidden_size, hidden_size), bias=True, transposed=True),
            Module("ln_2", "norm", (hidden_size,), bias=True),
            Module("mlp.c_fc", "linear", (hidden_size, intermediate_size), bias=True, transposed=True),
            Module("mlp.c_proj", "linear", (intermediate_size, hidden_size), bias=True, transposed=True),
        ),
        after=(
            Module("transformer.ln_f", "norm", (hidden_size,), bias=True),
            Module("lm_head", "head", (vocab_size, hidden_size)),
        ),
    )
