"""GPT-BigCode (transformers/models/gpt_bigcode): GPT-2's decoder with a fused projection of its own."""

from __future__ import annotations

from memplan.tape.graph import Graph
from memplan.tape.linear import linear
from memplan.tape.ops import split_heads
from memplan.tape.parts import Block, Model
from memplan.tape.programs.blocks import Settings
from memplan.tape.programs.gpt2 import decoder as gpt2_decoder
from memplan.tape.tensors import Tensor
from memplan.tape.views import regrouped, split_last


def decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    return gpt2_decoder(g, model, ids, settings, heads=_heads)


def _heads(g: Graph, model: Model, block: Block, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of all heads, and keys and values of one head or of all: views of one tensor."""
    architecture = model.architecture
    heads, head_dim = architecture.num_attention_heads, architecture.head_dim
    projected = linear(g, hidden, block.linears["attn.c_attn"])
    batch, length, width = projected.shape
    if architecture.num_key_value_heads > 1:
        fused = split_heads(g, projected, heads, 3 * head_dim)
        query, key, value = split_last(g, fused, (head_dim,) * 3)
        return query, key, value
    fused = regrouped(g, projected, (batch, 1, length, width), transposed=False)
    query, key, value = split_last(g, fused, (heads * head_dim, head_dim, head_dim))
    query = regrouped(g, query, (batch, heads, length, head_dim), transposed=True)
    return query, key, value
