"""Gemma 1, 2 and 3 (transformers/models/{gemma,gemma2,gemma3}/modeling_*.py)."""

from __future__ import annotations

from memplan.tape.attention import rotary
from memplan.tape.graph import Graph
from memplan.tape.linear import linear
from memplan.tape.modules import called
from memplan.tape.norms import embedding, scaled_rms_norm
from memplan.tape.ops import add, cast, scale_backward
from memplan.tape.parts import Block, Model
from memplan.tape.programs.blocks import Given, Settings
from memplan.tape.programs.frame import run_decoder
from memplan.tape.programs.layers import attend, gated_mlp, remembered, separate_heads
from memplan.tape.tensors import Parameter, Tensor

EMBED_SCALE = "model.embed_tokens.embed_scale"


def decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    return run_decoder(g, model, ids, settings, _block, _last_norm, embed=_scaled_embedding)


def _last_norm(g: Graph, model: Model, x: Tensor, settings: Settings) -> Tensor:
    return scaled_rms_norm(g, x, model.outside["model.norm.weight"])


def _scaled_embedding(g: Graph, model: Model, ids: Tensor) -> Tensor:
    """GemmaTextScaledWordEmbedding: the factor is a buffer of one element, cast to the dtype of the weights."""
    weight = model.current_embedding(g)
    x = embedding(g, ids, weight)
    factor = cast(g, model.buffers[EMBED_SCALE], weight.dtype)
    out = g.new(x.shape, x.dtype, "scaled embeddings")
    if g.needs(x):
        g.record(out, (x,), [factor], scale_backward)
    return out


def _block(g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings) -> Tensor:
    """From Gemma 2 on, what attention and MLP return is normalised too."""
    norms, sandwiched = block.norms, model.architecture.family != "gemma"
    residual = hidden
    hidden = _norm(g, hidden, norms, "input_layernorm")
    hidden, weights = _attention(g, model, block, hidden, given, settings)
    if sandwiched:
        hidden = _norm(g, hidden, norms, "post_attention_layernorm")
    hidden = add(g, residual, hidden, "residual stream")
    residual = hidden
    hidden = _norm(
        g, hidden, norms, "pre_feedforward_layernorm" if sandwiched else "post_attention_layernorm"
    )
    hidden = gated_mlp(g, block, hidden, model.architecture.hidden_act)
    if sandwiched:
        hidden = _norm(g, hidden, norms, "post_feedforward_layernorm")
    hidden = add(g, residual, hidden, "residual stream")
    return hidden


def _norm(g: Graph, x: Tensor, norms: dict[str, Parameter], name: str) -> Tensor:
    with g.module(name):
        return scaled_rms_norm(g, x, norms[f"{name}.weight"])


@called("attention")
def _attention(
    g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings
) -> tuple[Tensor, list[Tensor]]:
    query, key, value = separate_heads(g, model, block, hidden)
    with g.module("self_attn"):
        if model.architecture.qk_norm:
            query = _norm(g, query, {"q_norm.weight": block.norms["self_attn.q_norm.weight"]}, "q_norm")
            key = _norm(g, key, {"k_norm.weight": block.norms["self_attn.k_norm.weight"]}, "k_norm")
        query, key = rotary(g, query, key, *given.table)
        key, value = remembered(g, model, block, key, value, settings)
        output, weights = attend(g, model, query, key, value, given.mask, settings)
    output = linear(g, output, block.linears["self_attn.o_proj"])
    return output, weights
