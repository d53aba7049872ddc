"""GPT-2 (transformers/models/gpt2/modeling_gpt2.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from memplan.tape.graph import Graph
from memplan.tape.linear import linear
from memplan.tape.modules import called, entered, left
from memplan.tape.norms import embedding
from memplan.tape.ops import add, alias, dropout, split_heads
from memplan.tape.parts import Block, Model
from memplan.tape.programs.blocks import Given, Settings, run_blocks
from memplan.tape.programs.layers import attend, biased_block_norm, biased_norm, leaf, plain_mlp, remembered
from memplan.tape.programs.masks import attention_mask, positions
from memplan.tape.tensors import Gradients, Node, Tensor

Heads = Callable[[Graph, Model, Block, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Queries, keys and values of a block."""


def decoder(g: Graph, model: Model, ids: Tensor, settings: Settings, *, heads: Heads | None = None) -> Tensor:
    """`heads`: those of GPT-BigCode, whose softmax is in float32, and whose mask comes before the positions."""
    architecture = model.architecture
    mask_first = heads is not None
    entered(g, "transformer")
    with g.module("transformer"):
        with g.module("wte"):
            inputs_embeds = embedding(g, ids, model.current_embedding(g))
        if settings.behaviour.input_gradients:
            inputs_embeds = leaf(inputs_embeds, settings)
        position_ids = positions(g, ids.shape[1], settings)
        mask = attention_mask(g, ids.shape, inputs_embeds.dtype, settings) if mask_first else None
        with g.module("wpe"):
            position_embeds = embedding(g, position_ids, model.outside["transformer.wpe.weight"])
        hidden = add(g, inputs_embeds, position_embeds, "embeddings")
        if not mask_first:
            mask = attention_mask(g, ids.shape, hidden.dtype, settings)
        hidden = dropout(g, hidden, architecture.embedding_dropout)
        with g.module("h"):
            held = [hidden]
            del hidden  # the loop over the blocks is the only one that holds their input
            given = dict.fromkeys(
                architecture.attention_kinds, Given(mask, position_ids=None if mask_first else position_ids)
            )
            hidden = run_blocks(
                g,
                model,
                held.pop(),
                settings,
                partial(_block, heads=heads),
                given,
            )
        with g.module("ln_f"):
            hidden = biased_norm(g, hidden, model.outside, "transformer.ln_f")
        del given, position_ids, inputs_embeds, position_embeds
        return left(g, "transformer", hidden)


def _block(
    g: Graph,
    model: Model,
    block: Block,
    hidden: Tensor,
    given: Given,
    settings: Settings,
    heads: Heads | None,
) -> Tensor:
    if block.npt is not None and settings.npt_block is not None:
        return settings.npt_block(
            block, hidden, lambda x: _attention(g, model, block, x, given, settings, None)
        )
    residual = hidden
    hidden = biased_block_norm(g, block, hidden, "ln_1")
    output: Tensor | None = None  # locals go in the order in which they were first set
    output, weights = _attention(g, model, block, hidden, given, settings, heads)
    hidden = add(g, output, residual, "residual stream")
    residual = hidden
    hidden = biased_block_norm(g, block, hidden, "ln_2")
    feed_forward = gpt2_mlp(g, model, block, hidden)
    hidden = add(g, residual, feed_forward, "residual stream")
    return hidden


@called("attention")
def _attention(
    g: Graph,
    model: Model,
    block: Block,
    hidden: Tensor,
    given: Given,
    settings: Settings,
    heads: Heads | None,
) -> tuple[Tensor, list[Tensor]]:
    query, key, value = (heads or _gpt2_heads)(g, model, block, hidden)
    with g.module("attn"):
        key, value = remembered(g, model, block, key, value, settings)
        output, weights = attend(
            g, model, query, key, value, given.mask, settings, softmax_in_float32=heads is not None
        )
    output = linear(g, output, block.linears["attn.c_proj"])
    output = dropout(g, output, model.architecture.residual_dropout)
    return output, weights


def _gpt2_heads(g: Graph, model: Model, block: Block, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    architecture = model.architecture
    projected = linear(g, hidden, block.linears["attn.c_attn"])
    return _split_three(g, projected, architecture.num_attention_heads, architecture.head_dim)


def _split_three(g: Graph, projected: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """`split(d, dim=2)`, seen as heads; backward writes the three gradients into one tensor with `cat`."""
    batch, length, width = projected.shape
    parts = [alias(projected, (batch, length, width // 3)) for _ in range(3)]
    if g.needs(projected):
        node = None
        for slot, part in enumerate(parts):
            if node is None:
                node = g.record(part, (projected,), [], _split_three_backward, projected.shape)
            part.node, part.slot, part.needs_grad = node, slot, True
    query, key, value = parts
    key, value = split_heads(g, key, heads, head_dim), split_heads(g, value, heads, head_dim)
    return split_heads(g, query, heads, head_dim), key, value


def _split_three_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    return [g.new(node.extra, gradients[0].dtype, "grad of query, key and value")]


def gpt2_mlp(g: Graph, model: Model, block: Block, x: Tensor) -> Tensor:
    x = plain_mlp(g, model, block, x, "mlp.c_fc", "mlp.c_proj")
    return dropout(g, x, model.architecture.residual_dropout)
