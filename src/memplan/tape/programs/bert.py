"""BERT with its masked-language-model head (transformers/models/bert/modeling_bert.py)."""

from __future__ import annotations

from memplan.tape.graph import Graph
from memplan.tape.linear import linear
from memplan.tape.norms import embedding
from memplan.tape.ops import add, alias, dropout, split_heads
from memplan.tape.parts import Block, Model
from memplan.tape.programs.blocks import Given, Settings, run_blocks
from memplan.tape.programs.layers import (
    activation,
    attend,
    biased_block_norm,
    biased_norm,
    leaf,
)
from memplan.tape.programs.masks import given_mask, look_at_all
from memplan.tape.tensors import Tensor

EMBEDDINGS = "bert.embeddings"
TRANSFORM = "cls.predictions.transform"


def decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    """Every token sees all others: a mask of a batch without padding is looked at, and none is made."""
    with g.module("bert"):
        with g.module("embeddings"):
            hidden = _embedded(g, model, ids, settings)
        with g.module("mask"):
            look_at_all(g, given_mask(g, ids.shape, settings))
        with g.module("encoder.layer"):
            given = dict.fromkeys(model.architecture.attention_kinds, Given(None))
            output = run_blocks(g, model, hidden, settings, _block, given)
        del hidden  # a local of BertModel.forward
        return output


def logits(g: Graph, model: Model, hidden: Tensor) -> Tensor:
    """The head: a transform of the hidden states (B, S, d), and the embeddings as they are tied: (B, S, V)."""
    hidden = linear(g, hidden, model.linears[f"{TRANSFORM}.dense"])
    with g.module(TRANSFORM):
        hidden = activation(g, hidden, model.architecture.hidden_act)
        hidden = biased_norm(g, hidden, model.outside, f"{TRANSFORM}.LayerNorm")
    return linear(g, hidden, model.head)


def _embedded(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    """Of tokens, of their kinds, which are looked up for one row and seen by all, and of positions, a buffer."""
    outside, length = model.outside, ids.shape[1]
    kinds = g.new((1, length), "int64", "token types")
    inputs_embeds = embedding(g, ids, model.current_embedding(g))
    if settings.behaviour.input_gradients:
        inputs_embeds = leaf(inputs_embeds, settings)
    of_kinds = embedding(g, alias(kinds, ids.shape), outside[f"{EMBEDDINGS}.token_type_embeddings.weight"])
    hidden = add(g, inputs_embeds, of_kinds, "embeddings")
    positions = alias(model.buffers[f"{EMBEDDINGS}.position_ids"], (1, length))
    of_positions = embedding(g, positions, outside[f"{EMBEDDINGS}.position_embeddings.weight"])
    hidden = add(g, hidden, of_positions, "embeddings")
    with g.module("LayerNorm"):
        hidden = biased_norm(g, hidden, outside, f"{EMBEDDINGS}.LayerNorm")
    hidden = dropout(g, hidden, model.architecture.embedding_dropout)
    del inputs_embeds, kinds, of_kinds, of_positions
    return hidden


def _block(g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings) -> Tensor:
    attended, weights = _attention(g, model, block, hidden, settings)
    inner = activation(
        g, linear(g, attended, block.linears["intermediate.dense"]), model.architecture.hidden_act
    )
    return _added(g, model, block, inner, attended, "output")


def _attention(
    g: Graph, model: Model, block: Block, hidden: Tensor, settings: Settings
) -> tuple[Tensor, list[Tensor]]:
    output, weights = _attended(g, model, block, hidden, settings)
    return _added(g, model, block, output, hidden, "attention.output"), weights


def _attended(
    g: Graph, model: Model, block: Block, hidden: Tensor, settings: Settings
) -> tuple[Tensor, list[Tensor]]:
    architecture, linears = model.architecture, block.linears
    heads, head_dim = architecture.num_attention_heads, architecture.head_dim
    query = split_heads(g, linear(g, hidden, linears["attention.self.query"]), heads, head_dim)
    key = split_heads(g, linear(g, hidden, linears["attention.self.key"]), heads, head_dim)
    value = split_heads(g, linear(g, hidden, linears["attention.self.value"]), heads, head_dim)
    with g.module("attention.self"):
        return attend(
            g, model, query, key, value, None, settings, softmax_in_float32=False, casts_weights=False
        )


def _added(g: Graph, model: Model, block: Block, x: Tensor, residual: Tensor, name: str) -> Tensor:
    """BertSelfOutput and BertOutput: a linear layer, dropout, and the norm of its sum with what went before."""
    output = linear(g, x, block.linears[f"{name}.dense"])
    output = dropout(g, output, model.architecture.residual_dropout)
    return biased_block_norm(g, block, add(g, output, residual, "residual stream"), f"{name}.LayerNorm")
