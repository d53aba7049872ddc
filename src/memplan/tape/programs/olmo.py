"""OLMo 1, 2 and 3 (transformers/models/{olmo,olmo2,olmo3}/modeling_*.py)."""

from __future__ import annotations

from memplan.tape.attention import rotary
from memplan.tape.graph import Graph
from memplan.tape.linear import linear
from memplan.tape.modules import called
from memplan.tape.norms import float_rms_norm, layer_norm
from memplan.tape.ops import add, cast, clamp_in_place
from memplan.tape.parts import Block, Model
from memplan.tape.programs.blocks import Given, Settings
from memplan.tape.programs.frame import run_decoder
from memplan.tape.programs.layers import attend, gated_mlp, remembered, seen_as_heads
from memplan.tape.tensors import Tensor


def decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    """The rotary tables stay in float32."""
    return run_decoder(g, model, ids, settings, _block, _last_norm, table_dtype="float32")


def _last_norm(g: Graph, model: Model, x: Tensor, settings: Settings) -> Tensor:
    if model.architecture.family == "olmo":
        return _plain_norm(g, x)
    return float_rms_norm(g, x, model.outside["model.norm.weight"])


def _plain_norm(g: Graph, x: Tensor) -> Tensor:
    """OlmoLayerNorm: in float32, without weight and bias."""
    return cast(g, layer_norm(g, cast(g, x, "float32"), None, None), x.dtype)


def _block(g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings) -> Tensor:
    """OLMo 1 normalises what attention and MLP are given, the others what they return."""
    hidden_act = model.architecture.hidden_act
    residual = hidden
    if model.architecture.family == "olmo":
        with g.module("input_layernorm"):
            hidden = _plain_norm(g, hidden)
        hidden, weights = _attention(g, model, block, hidden, given, settings)
        hidden = add(g, residual, hidden, "residual stream")
        residual = hidden
        with g.module("post_attention_layernorm"):
            hidden = _plain_norm(g, hidden)
        hidden = gated_mlp(g, block, hidden, hidden_act)
    else:
        hidden, weights = _attention(g, model, block, hidden, given, settings)
        hidden = _norm(g, block, hidden, "post_attention_layernorm")
        hidden = add(g, residual, hidden, "residual stream")
        residual = hidden
        hidden = gated_mlp(g, block, hidden, hidden_act)
        hidden = _norm(g, block, hidden, "post_feedforward_layernorm")
    hidden = add(g, residual, hidden, "residual stream")
    return hidden


def _norm(g: Graph, block: Block, x: Tensor, name: str) -> Tensor:
    with g.module(name):
        return float_rms_norm(g, x, block.norms[f"{name}.weight"])


@called("attention")
def _attention(
    g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings
) -> tuple[Tensor, list[Tensor]]:
    architecture, linears = model.architecture, block.linears
    query = linear(g, hidden, linears["self_attn.q_proj"])
    if architecture.qk_norm:
        query = _norm(g, block, query, "self_attn.q_norm")
    key = linear(g, hidden, linears["self_attn.k_proj"])
    if architecture.qk_norm:
        key = _norm(g, block, key, "self_attn.k_norm")
    value = linear(g, hidden, linears["self_attn.v_proj"])
    with g.module("self_attn"):
        if architecture.clip_qkv is not None:
            clamp_in_place(g, query)
            clamp_in_place(g, key)
            clamp_in_place(g, value)
        query, key, value = seen_as_heads(g, model, query, key, value)
        query, key = _rotary_in_float32(g, query, key, given)
        key, value = remembered(g, model, block, key, value, settings)
        output, weights = attend(g, model, query, key, value, given.mask, settings)
    output = linear(g, output, linears["self_attn.o_proj"])
    return output, weights


def _rotary_in_float32(g: Graph, query: Tensor, key: Tensor, given: Given) -> tuple[Tensor, Tensor]:
    dtype = query.dtype
    query_embedded, key_embedded = rotary(g, query, key, *given.table)
    return cast(g, query_embedded, dtype), cast(g, key_embedded, dtype)
