"""BERT with its masked-language-model head (transformers/models/bert)."""

from __future__ import annotations

from typing import Any

from memplan.model.architecture import Architecture, Buffer
from memplan.model.families.layout import Layout, Module
from memplan.model.keys import Keys


def _bert(keys: Keys) -> dict[str, Any]:
    keys.refuse("is_decoder")
    keys.refuse("add_cross_attention")
    keys.must_be("tie_word_embeddings", True)
    keys.must_be("chunk_size_feed_forward", 0)
    hidden_size = keys.size("hidden_size", default=768)
    heads = keys.size("num_attention_heads", default=12)
    keys.must_divide("num_attention_heads", heads, "hidden_size", hidden_size)
    dropout = keys.probability("hidden_dropout_prob", 0.1)
    return {
        "family": "bert",
        "is_encoder": True,
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("intermediate_size", default=3072),
        "num_hidden_layers": keys.size("num_hidden_layers", default=12),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden_size // heads,
        "vocab_size": keys.size("vocab_size", default=30522),
        "max_position_embeddings": keys.size("max_position_embeddings", default=512),
        "type_vocab_size": keys.size("type_vocab_size", default=2),
        "tie_word_embeddings": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "hidden_act": keys.text("hidden_act", "gelu"),
        "attention_dropout": keys.probability("attention_probs_dropout_prob", 0.1),
        "residual_dropout": dropout,
        "embedding_dropout": dropout,
    }


READERS = {"bert": _bert}


def layout(architecture: Architecture) -> Layout:
    """The head's bias is registered twice; it is listed once, before the transform, as `named_parameters` does."""
    width, inner = architecture.hidden_size, architecture.intermediate_size
    vocab_size, positions = architecture.vocab_size, architecture.max_position_embeddings
    return Layout(
        before=(
            Module("bert.embeddings.word_embeddings", "embedding", (vocab_size, width)),
            Module("bert.embeddings.position_embeddings", "embedding", (positions, width)),
            Module(
                "bert.embeddings.token_type_embeddings", "embedding", (architecture.type_vocab_size, width)
            ),
            Module("bert.embeddings.LayerNorm", "norm", (width,), bias=True),
        ),
        block_prefix="bert.encoder.layer",
        block=(
            Module("attention.self.query", "linear", (width, width), bias=True),
            Module("attention.self.key", "linear", (width, width), bias=True),
            Module("attention.self.value", "linear", (width, width), bias=True),
            Module("attention.output.dense", "linear", (width, width), bias=True),
            Module("attention.output.LayerNorm", "norm", (width,), bias=True),
            Module("intermediate.dense", "linear", (inner, width), bias=True),
            Module("output.dense", "linear", (width, inner), bias=True),
            Module("output.LayerNorm", "norm", (width,), bias=True),
        ),
        after=(
            Module("cls.predictions.bias", "bias", (vocab_size,)),
            Module("cls.predictions.transform.dense", "linear", (width, width), bias=True),
            Module("cls.predictions.transform.LayerNorm", "norm", (width,), bias=True),
            Module("cls.predictions.decoder", "head", (vocab_size, width), bias=True),
        ),
        buffers_before_blocks=True,
        head_bias="cls.predictions.bias",
        buffers=(
            Buffer("bert.embeddings.position_ids", (1, positions), "int64", None),
            Buffer("bert.embeddings.token_type_ids", (1, positions), "int64", None),
        ),
    )
