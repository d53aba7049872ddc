"""What the programs of several families share inside their blocks: rotary tables, norms, heads, the cache, MLPs."""

from __future__ import annotations

from memplan.tape.attention import attention
from memplan.tape.graph import Graph
from memplan.tape.kernels import triton_rms_norm
from memplan.tape.liger import liger_gate, liger_rms_norm
from memplan.tape.linear import linear
from memplan.tape.modules import called
from memplan.tape.norms import layer_norm, rms_norm
from memplan.tape.ops import (
    add,
    add_scalar,
    alias,
    cast,
    concatenate,
    mul,
    power,
    promote,
    scale,
    split_heads,
    unary_saving_input,
    unary_saving_output,
)
from memplan.tape.parts import Block, Model
from memplan.tape.programs.blocks import Settings, kind_of
from memplan.tape.tensors import Parameter, Tensor

WITHOUT_POSITIONS = ("gpt_bigcode", "bert")
"""Families whose blocks are not given the positions, so that attention has none to look at."""


def leaf(x: Tensor, settings: Settings) -> Tensor:
    """enable_input_require_grads: the frozen embedding's output becomes a leaf that collects a gradient."""
    assert x.storage is not None
    if x.needs_grad:
        return x
    settings.input_leaf = Parameter("", x.shape, x.dtype, x.storage, None, trainable=True)
    return settings.input_leaf


def norm(g: Graph, x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    if settings.behaviour.liger:
        return liger_rms_norm(g, x, weight)
    return (triton_rms_norm if settings.behaviour.triton_norm else rms_norm)(g, x, weight)


def last_norm(g: Graph, model: Model, x: Tensor, settings: Settings) -> Tensor:
    """`model.norm`"""
    return norm(g, x, model.outside["model.norm.weight"], settings)


def block_norm(g: Graph, block: Block, x: Tensor, name: str, settings: Settings) -> Tensor:
    """A norm of a block, by its name."""
    with g.module(name):
        return norm(g, x, block.norms[f"{name}.weight"], settings)


def biased_norm(g: Graph, x: Tensor, norms: dict[str, Parameter], name: str) -> Tensor:
    """A layer norm with weight and bias, by its name."""
    return layer_norm(g, x, norms[f"{name}.weight"], norms[f"{name}.bias"])


def biased_block_norm(g: Graph, block: Block, x: Tensor, name: str) -> Tensor:
    with g.module(name):
        return biased_norm(g, x, block.norms, name)


@called("rotary_emb")
def rotary_table(
    g: Graph, shape: tuple[int, ...], size: int, dtype: str, *, by_product: bool = False
) -> tuple[Tensor, Tensor]:
    """
    Cosines and sines of positions (1 or B, S), made in float32: (1 or B, 1, S, size). `by_product`: as
    `Behaviour.rotary_product` says, with the positions held to the end.
    """
    rows, length = shape
    with g.module("rotary_emb"):
        position: Tensor | None = g.new((rows, length, 1), "float32", "positions")
        if by_product:
            g.claim_workspace()
        freqs = g.new((rows, length, size // 2), "float32", "frequencies")
        if not by_product:
            position = None
        emb = g.new((rows, length, size), "float32", "angles")
        cos = g.new(emb.shape, "float32", "cos")
        cos = g.new(emb.shape, "float32", "cos")
        sin = g.new(emb.shape, "float32", "sin")
        sin = g.new(emb.shape, "float32", "sin")
        low_cos, low_sin = cast(g, cos, dtype), cast(g, sin, dtype)
        del position, freqs, emb, cos, sin
    shape = (rows, 1, length, size)
    return alias(low_cos, shape), alias(low_sin, shape)


def attend(
    g: Graph,
    model: Model,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: Settings,
    *,
    softmax_in_float32: bool = True,
    casts_weights: bool = True,
    told_of_groups: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """
    The attention function that the job names: (B, S, H*D) before the output projection, and the weights of eager
    attention, which transformers' blocks hold to their end.
    """
    architecture, behaviour = model.architecture, settings.behaviour
    weights: list[Tensor] = []
    if behaviour.attention_waits and g.units is not None:
        g.wait()
    output = attention(
        g, query, key, value,
        implementation=settings.attention, mask=mask, probability=architecture.attention_dropout,
        softmax_in_float32=softmax_in_float32, casts_weights=casts_weights,
        causal=not architecture.is_encoder, softcapped=architecture.attn_logit_softcapping is not None,
        padded=behaviour.padding_mask, repeated=behaviour.repeat_key_heads,
        told_of_groups=told_of_groups, weights=weights,
        positions_seen=architecture.family not in WITHOUT_POSITIONS and not behaviour.starts_in_batch,
        all_rows=behaviour.checks_all_rows,
    )  # fmt: skip
    return output, weights


def separate_heads(g: Graph, model: Model, block: Block, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, S, D) of a projection each."""
    architecture, linears = model.architecture, block.linears
    heads, kv_heads, head_dim = (
        architecture.num_attention_heads, architecture.num_key_value_heads, architecture.head_dim,
    )  # fmt: skip
    query = split_heads(g, linear(g, hidden, linears["self_attn.q_proj"]), heads, head_dim)
    key = split_heads(g, linear(g, hidden, linears["self_attn.k_proj"]), kv_heads, head_dim)
    value = split_heads(g, linear(g, hidden, linears["self_attn.v_proj"]), kv_heads, head_dim)
    return query, key, value


def seen_as_heads(
    g: Graph, model: Model, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, S, H*D) as (B, H, S, D), views."""
    architecture = model.architecture
    head_dim = architecture.head_dim
    query = split_heads(g, query, architecture.num_attention_heads, head_dim)
    key = split_heads(g, key, architecture.num_key_value_heads, head_dim)
    value = split_heads(g, value, architecture.num_key_value_heads, head_dim)
    return query, key, value


def remembered(
    g: Graph, model: Model, block: Block, key: Tensor, value: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """
    Key and value as the cache gives them back, where there is one. What it begins with has the key's dtype, so that
    autocast makes the value's as wide. That of a sliding window keeps its size (cache_utils.py).
    """
    if settings.behaviour.use_cache:
        if kind_of(model, block) == "sliding_attention":
            settings.remember(g, block.layer, g.new((), "int64", "window of the cache"))
        dtype = key.dtype
        key = cached(g, block, key, settings)
        value = cached(g, block, cast(g, value, promote(dtype, value.dtype)), settings)
    return key, value


def cached(g: Graph, block: Block, states: Tensor, settings: Settings) -> Tensor:
    """DynamicCache.update: the states concatenated to an empty cache, which keeps them."""
    cached = concatenate(g, (states,), states.shape, "cache")
    settings.remember(g, block.layer, cached)
    return cached


@called("mlp")
def gated_mlp(g: Graph, block: Block, x: Tensor, hidden_act: str = "silu") -> Tensor:
    linears = block.linears
    gated = mul(
        g,
        activation(g, linear(g, x, linears["mlp.gate_proj"]), hidden_act),
        linear(g, x, linears["mlp.up_proj"]),
        "gated",
    )
    return linear(g, gated, linears["mlp.down_proj"])


@called("mlp")
def liger_mlp(g: Graph, block: Block, x: Tensor) -> Tensor:
    """LigerSwiGLUMLP"""
    linears = block.linears
    gated = liger_gate(g, linear(g, x, linears["mlp.gate_proj"]), linear(g, x, linears["mlp.up_proj"]))
    return linear(g, gated, linears["mlp.down_proj"])


@called("mlp")
def plain_mlp(g: Graph, model: Model, block: Block, x: Tensor, up: str, down: str) -> Tensor:
    x = linear(g, x, block.linears[up])
    x = activation(g, x, model.architecture.hidden_act)
    return linear(g, x, block.linears[down])


@called("mlp.act_fn")
def activation(g: Graph, x: Tensor, name: str) -> Tensor:
    """An entry of transformers' ACT2FN."""
    with g.module("mlp.act_fn"):
        if name == "gelu_new":
            return _gelu_new(g, x)
        return unary_saving_input(g, x, name)


def _gelu_new(g: Graph, x: Tensor) -> Tensor:
    """NewGELUActivation: 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))), operation by operation."""
    half = scale(g, x, "half")
    inner = add(g, x, scale(g, power(g, x, "cube"), "scaled cube"), "polynomial")
    inner = scale(g, inner, "scaled polynomial")
    inner = unary_saving_output(g, inner, "tanh")
    inner = add_scalar(g, inner, "1 + tanh")
    return mul(g, half, inner, "gelu")
