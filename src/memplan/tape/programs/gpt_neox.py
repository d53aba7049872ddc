"""GPT-NeoX, and Pythia, which is one (transformers/models/gpt_neox)."""

from __future__ import annotations

from memplan.tape.attention import rotate_half
from memplan.tape.graph import Graph
from memplan.tape.linear import linear
from memplan.tape.modules import called
from memplan.tape.ops import add, concatenate, dropout, mul, narrow_last, split_heads
from memplan.tape.parts import Block, Model
from memplan.tape.programs.blocks import Given, Settings
from memplan.tape.programs.frame import run_decoder
from memplan.tape.programs.layers import attend, biased_block_norm, biased_norm, plain_mlp, remembered
from memplan.tape.tensors import Tensor
from memplan.tape.views import split_last

MODULES = ("gpt_neox", "layers", "final_layer_norm")


def decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    return run_decoder(g, model, ids, settings, _block, _last_norm, modules=MODULES)


def _last_norm(g: Graph, model: Model, x: Tensor, settings: Settings) -> Tensor:
    return biased_norm(g, x, model.outside, ".".join((MODULES[0], MODULES[2])))


def _block(g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings) -> Tensor:
    probability = model.architecture.residual_dropout
    normed = biased_block_norm(g, block, hidden, "input_layernorm")
    attended, weights = _attention(g, model, block, normed, given, settings)
    del normed
    attended = dropout(g, attended, probability)
    if model.architecture.parallel_residual:
        output = dropout(g, _mlp(g, model, block, hidden), probability)
        return add(g, add(g, output, attended, "sum of branches"), hidden, "residual stream")
    attended = add(g, attended, hidden, "residual stream")
    output = dropout(g, _mlp(g, model, block, attended), probability)
    return add(g, output, attended, "residual stream")


def _mlp(g: Graph, model: Model, block: Block, x: Tensor) -> Tensor:
    normed = biased_block_norm(g, block, x, "post_attention_layernorm")  # held as long as the MLP runs
    return plain_mlp(g, model, block, normed, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


@called("attention")
def _attention(
    g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings
) -> tuple[Tensor, list[Tensor]]:
    architecture = model.architecture
    heads, head_dim = architecture.num_attention_heads, architecture.head_dim
    qkv = split_heads(g, linear(g, hidden, block.linears["attention.query_key_value"]), heads, 3 * head_dim)
    query, key, value = split_last(g, qkv, (head_dim,) * 3)
    with g.module("attention"):
        query, key = _partial_rotary(g, query, key, *given.table)
        key, value = remembered(g, model, block, key, value, settings)
        output, weights = attend(g, model, query, key, value, given.mask, settings)
    return linear(g, output, block.linears["attention.dense"]), weights


def _partial_rotary(g: Graph, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb: the first channels are turned, then all are put together again."""
    rotary_dim = cos.shape[-1]
    rest = query.shape[-1] - rotary_dim
    turned_query, rest_query = narrow_last(g, query, rotary_dim), narrow_last(g, query, rest)
    turned_key, rest_key = narrow_last(g, key, rotary_dim), narrow_last(g, key, rest)
    query_embedded = add(
        g, mul(g, turned_query, cos), mul(g, rotate_half(g, turned_query), sin), "rotary query"
    )
    key_embedded = add(g, mul(g, turned_key, cos), mul(g, rotate_half(g, turned_key), sin), "rotary key")
    query_embedded = concatenate(g, (query_embedded, rest_query), query.shape, "query")
    key_embedded = concatenate(g, (key_embedded, rest_key), key.shape, "key")
    return query_embedded, key_embedded
