"""Phi-3 (transformers/models/phi3/modeling_phi3.py)."""

from __future__ import annotations

from memplan.tape.attention import partial_rotary
from memplan.tape.graph import Graph
from memplan.tape.linear import linear
from memplan.tape.modules import called
from memplan.tape.ops import add, dropout, mul, narrow_last
from memplan.tape.parts import Block, Model
from memplan.tape.programs.blocks import Given, Settings
from memplan.tape.programs.frame import run_decoder
from memplan.tape.programs.layers import activation, attend, block_norm, last_norm, remembered, seen_as_heads
from memplan.tape.tensors import Tensor
from memplan.tape.views import split_last


def decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    return run_decoder(g, model, ids, settings, _block, last_norm)


def _block(g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings) -> Tensor:
    probability = model.architecture.residual_dropout
    residual = hidden
    hidden = block_norm(g, block, hidden, "input_layernorm", settings)
    hidden, weights = _attention(g, model, block, hidden, given, settings)
    hidden = add(g, residual, dropout(g, hidden, probability), "residual stream")
    residual = hidden
    hidden = block_norm(g, block, hidden, "post_attention_layernorm", settings)
    hidden = _mlp(g, model, block, hidden)
    hidden = add(g, residual, dropout(g, hidden, probability), "residual stream")
    return hidden


@called("attention")
def _attention(
    g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings
) -> tuple[Tensor, list[Tensor]]:
    """Query, key and value are slices of one product, each of which gives a gradient of the product's size."""
    architecture = model.architecture
    head_dim = architecture.head_dim
    query_size, key_value_size = (
        architecture.num_attention_heads * head_dim, architecture.num_key_value_heads * head_dim,
    )  # fmt: skip
    qkv = linear(g, hidden, block.linears["self_attn.qkv_proj"])
    with g.module("self_attn"):
        query = narrow_last(g, qkv, query_size)
        key, value = narrow_last(g, qkv, key_value_size), narrow_last(g, qkv, key_value_size)
        query, key, value = seen_as_heads(g, model, query, key, value)
        query, key = partial_rotary(g, query, key, *given.table)
        key, value = remembered(g, model, block, key, value, settings)
        output, weights = attend(g, model, query, key, value, given.mask, settings)
    output = linear(g, output, block.linears["self_attn.o_proj"])
    return output, weights


@called("mlp")
def _mlp(g: Graph, model: Model, block: Block, x: Tensor) -> Tensor:
    """Gate and up are halves of one product."""
    up_states = linear(g, x, block.linears["mlp.gate_up_proj"])
    with g.module("mlp"):
        gate, up_states = split_last(g, up_states, (up_states.shape[-1] // 2,) * 2)
    up_states = mul(g, up_states, activation(g, gate, model.architecture.hidden_act), "gated")
    return linear(g, up_states, block.linears["mlp.down_proj"])
