"""Falcon (transformers/models/falcon): attention and MLP side by side, few key heads, a mask in every case."""

from __future__ import annotations

from functools import partial

from memplan.tape.attention import package_dtype, rotary
from memplan.tape.graph import Graph
from memplan.tape.linear import linear
from memplan.tape.modules import called
from memplan.tape.ops import add, cast, dropout, merge_heads, reshape
from memplan.tape.parts import Block, Model
from memplan.tape.products import batched_matmul, softmax
from memplan.tape.programs.blocks import Given, Settings
from memplan.tape.programs.frame import run_decoder
from memplan.tape.programs.layers import attend, biased_block_norm, biased_norm, plain_mlp, remembered
from memplan.tape.tensors import Tensor
from memplan.tape.views import add_in_place, chosen_heads, divide_in_place, spread_heads

MODULES = ("transformer", "h", "ln_f")


def decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    held: list[Tensor] = []
    run = partial(_block, held=held)
    hidden = run_decoder(g, model, ids, settings, run, _last_norm, modules=MODULES, always_masked=True)
    held.clear()
    return hidden


def _last_norm(g: Graph, model: Model, x: Tensor, settings: Settings) -> Tensor:
    return biased_norm(g, x, model.outside, ".".join((MODULES[0], MODULES[2])))


def _block(
    g: Graph,
    model: Model,
    block: Block,
    hidden: Tensor,
    given: Given,
    settings: Settings,
    held: list[Tensor],
) -> Tensor:
    """`held`: weights of eager attention, which `outputs` of the model keeps until the next block returns its own."""
    residual = hidden
    if model.architecture.separate_norms:
        attention_input = biased_block_norm(g, block, hidden, "ln_attn")
        mlp_input = biased_block_norm(g, block, hidden, "ln_mlp")
    else:
        attention_input = mlp_input = biased_block_norm(g, block, hidden, "input_layernorm")
    attended, weights = _attention(g, model, block, attention_input, given, settings)
    x = plain_mlp(g, model, block, mlp_input, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    x = dropout(g, add_in_place(g, x, attended), model.architecture.residual_dropout)
    output = add(g, residual, x, "residual stream")
    if not g.in_backward:
        held[:] = weights
    return output


@called("attention")
def _attention(
    g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings
) -> tuple[Tensor, list[Tensor]]:
    fused = linear(g, hidden, block.linears["self_attention.query_key_value"])
    with g.module("self_attention"):
        query, key, value = _heads(g, model, fused)
        query, key = rotary(g, query, key, *given.table)
        key, value = remembered(g, model, block, key, value, settings)
        if settings.attention == "eager":
            output, weights = _eager(g, query, key, value, given.mask)
        else:
            if settings.attention == "flash_attention_2" and g.device == "cuda":
                dtype = package_dtype(g, query)  # in its own forward, which keeps no others
                query = cast(g, query, dtype)
                key = cast(g, key, dtype)
                value = cast(g, value, dtype)
            groups_said = settings.attention != "sdpa"
            output, weights = attend(
                g, model, query, key, value, given.mask, settings, told_of_groups=groups_said
            )
    return linear(g, output, block.linears["self_attention.dense"]), weights


def _heads(g: Graph, model: Model, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    FalconAttention._split_heads. Key and value are indexed with lists, which copies them; in the newer form they are
    then copied once per query head, and the queries too, whose groups have other rows in between.
    """
    architecture = model.architecture
    heads, groups, head_dim = (
        architecture.num_attention_heads, architecture.num_key_value_heads, architecture.head_dim,
    )  # fmt: skip
    batch, length, _ = fused.shape
    rows = heads // groups if architecture.grouped_projection else heads
    split = reshape(g, fused, (batch, length, groups, rows + 2, head_dim))
    query = chosen_heads(g, split, rows, copied=False)
    key, value = chosen_heads(g, split, 1, copied=True), chosen_heads(g, split, 1, copied=True)
    if not architecture.grouped_projection:
        return query, key, value
    spread = [spread_heads(g, query, 1), spread_heads(g, key, rows), spread_heads(g, value, rows)]
    del query, key, value
    return spread[0], spread[1], spread[2]


def _eager(
    g: Graph, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Scores divided in place, softmax in their dtype, no dropout; and the weights."""
    scores = divide_in_place(g, batched_matmul(g, query, key, query.shape[2]))
    if mask is not None:
        scores = softmax(g, add(g, scores, mask, "masked scores"), query.dtype)
    return merge_heads(g, batched_matmul(g, scores, value, value.shape[-1])), [scores]
