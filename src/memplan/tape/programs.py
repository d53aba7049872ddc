"""
The decoders of the supported families, written as transformers' own `forward` methods are: same operations, same
order, same local variables, so that what they hold is held as long.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

from memplan.tape.attention import attention, rotary
from memplan.tape.behaviour import Behaviour
from memplan.tape.engine import ITEMSIZE, CheckpointFrame, Gradients, Graph, Node, Parameter, Tensor
from memplan.tape.fused_lora import OUTPUT, QKV, fused_output, fused_qkv, fuses
from memplan.tape.kernels import triton_rms_norm, triton_rotary
from memplan.tape.linear import linear
from memplan.tape.model import Block, Model
from memplan.tape.ops import (
    add,
    add_scalar,
    alias,
    cast,
    concatenate,
    dropout,
    embedding,
    layer_norm,
    mul,
    power,
    reshape,
    rms_norm,
    scale,
    split_heads,
    swap_heads,
    unary_saving_input,
    unary_saving_output,
)

CPU_RNG_STATE_BYTES = 5056
"""torch.get_rng_state(), which checkpointing keeps per block; on the host, so that it counts only on the CPU."""


class Settings:
    """What the programs need to know of the job."""

    def __init__(
        self, attention: str, behaviour: Behaviour | None = None, *, offload_inputs: bool = False
    ) -> None:
        self.attention = attention
        self.behaviour = behaviour or Behaviour()
        self.offload_inputs = offload_inputs
        self.host_bytes = 0
        self.kept: list[tuple[Parameter, Tensor | None]] | None = None
        """Inputs of checkpointed blocks and their gradients, where something keeps them until backward ends."""
        self.cache: list[tuple[int, Tensor]] = []
        self.npt_block: Callable[[Block, Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None
        """Runs a converted block, given its attention."""


def decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    """Hidden states (B, S, d) after the final norm."""
    if model.architecture.family == "gpt2":
        return _gpt2_decoder(g, model, ids, settings)
    return _llama_decoder(g, model, ids, settings)


def run_blocks(
    g: Graph, model: Model, hidden: Tensor, settings: Settings, run: Callable[[Block, Tensor], Tensor]
) -> Tensor:
    """The blocks one after the other; a checkpointed one keeps its input only."""
    base = g.path
    for block in model.blocks:
        g.enter(block.layer)
        g.path = f"{base}.{{layer}}"
        if g.units is not None:
            g.units.before_forward(block.layer)
        if block.checkpointed and g.grad_enabled:
            hidden = _checkpointed(g, block, hidden, run, settings)
        else:
            hidden = run(block, hidden)
        if g.units is not None:
            g.units.after_forward(block.layer)
    g.path = base
    g.enter(None)
    return hidden


def _checkpointed(
    g: Graph, block: Block, hidden: Tensor, run: Callable[[Block, Tensor], Tensor], settings: Settings
) -> Tensor:
    path = g.path
    if settings.behaviour.reentrant:
        return _checkpointed_reentrant(g, block, hidden, run, settings)
    if settings.offload_inputs:
        # The input goes to the host and comes back for the recomputation.
        settings.host_bytes += prod(hidden.shape) * ITEMSIZE[hidden.dtype]
        shape, dtype, node, slot, needs_grad = (
            hidden.shape, hidden.dtype, hidden.node, hidden.slot, hidden.needs_grad,
        )  # fmt: skip

        def rerun() -> None:
            g.path = path
            fetched = g.new(shape, dtype, "input fetched from the host")
            fetched.node, fetched.slot, fetched.needs_grad = node, slot, needs_grad
            run(block, fetched)
    else:

        def rerun() -> None:
            g.path = path
            run(block, hidden)

    frame = CheckpointFrame(g, rerun)
    if g.device == "cpu":
        frame.rng_state = g.storage(CPU_RNG_STATE_BYTES, "random state")
    outer, g.save_hook = g.save_hook, frame.pack
    try:
        return run(block, hidden)
    finally:
        g.save_hook = outer


def _checkpointed_reentrant(
    g: Graph,
    block: Block,
    hidden: Tensor,
    run: Callable[[Block, Tensor], Tensor],
    settings: Settings,
) -> Tensor:
    """
    torch.utils.checkpoint with use_reentrant=True (CheckpointFunction): forward without a graph; backward runs the
    whole block again and then its graph, and holds the block's output and its gradient until both are done, and
    the block's input and that one's gradient for as long as `settings.kept`.
    """
    path = g.path
    with g.no_grad():
        out = run(block, hidden)
    if g.needs(hidden):
        backward = partial(_reentrant_backward, path=path, block=block, run=run, settings=settings)
        g.record(out, (hidden,), [hidden], backward)
    return out


def _reentrant_backward(
    g: Graph,
    node: Node,
    gradients: dict[int, Tensor],
    saved: list[Tensor | None],
    *,
    path: str,
    block: Block,
    run: Callable[[Block, Tensor], Tensor],
    settings: Settings,
) -> Gradients:
    x = saved[0]
    assert x is not None and x.storage is not None
    leaf = Parameter("", x.shape, x.dtype, x.storage, block.layer, trainable=True)
    outer = g.path, g.category
    g.path, g.category, g.grad_enabled = path, "activations", True
    output = run(block, leaf)
    g.leave_autocast()
    g.grad_enabled = False
    g.backward_from(output, gradients[0])
    g.path, g.category = outer
    if settings.kept is not None:
        settings.kept.append((leaf, leaf.grad))
    gradient, leaf.grad = leaf.grad, None
    return [gradient]


def _leaf(x: Tensor) -> Tensor:
    """enable_input_require_grads: the frozen embedding's output becomes a leaf that collects a gradient."""
    assert x.storage is not None
    return x if x.needs_grad else Parameter("", x.shape, x.dtype, x.storage, None, trainable=True)


# -- Llama, Mistral, Qwen2, Qwen3 --------------------------------------------------------------------------


def _llama_decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    architecture = model.architecture
    with g.module("model"):
        inputs_embeds = embedding(g, ids, model.embedding)
        if settings.behaviour.input_gradients:
            inputs_embeds = _leaf(inputs_embeds)
        length = ids.shape[1]
        position_ids = _positions(g, length)
        mask = causal_mask(g, ids.shape, inputs_embeds.dtype) if settings.attention == "eager" else None
        hidden = inputs_embeds
        cos, sin = _rotary_embedding(g, length, architecture.head_dim, hidden.dtype)
        with g.module("layers"):
            hidden = run_blocks(
                g,
                model,
                hidden,
                settings,
                lambda block, x: _llama_block(g, model, block, x, cos, sin, mask, settings),
            )
        with g.module("norm"):
            hidden = _norm(g, hidden, model.final_norm["weight"], settings)
        del position_ids
        return hidden


def _norm(g: Graph, x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    return (triton_rms_norm if settings.behaviour.triton_norm else rms_norm)(g, x, weight)


def _positions(g: Graph, length: int) -> Tensor:
    start = g.new((length,), "int64", "positions")
    positions = g.new((length,), "int64", "positions")
    del start
    return positions


def causal_mask(g: Graph, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The (B, 1, S, S) mask that eager attention adds: made as bool, kept in the dtype of the hidden states."""
    batch, length = shape
    with g.module("mask"):
        allowed = g.new((1, 1, length, length), "bool", "causal mask")
        mask = g.new((batch, 1, length, length), dtype, "causal mask")
        del allowed
    return mask


def _rotary_embedding(g: Graph, length: int, head_dim: int, dtype: str) -> tuple[Tensor, Tensor]:
    with g.module("rotary_emb"):
        position = g.new((1, length, 1), "float32", "positions")
        freqs = g.new((1, length, head_dim // 2), "float32", "frequencies")
        del position
        emb = g.new((1, length, head_dim), "float32", "angles")
        cos = g.new(emb.shape, "float32", "cos")
        cos = g.new(emb.shape, "float32", "cos")
        sin = g.new(emb.shape, "float32", "sin")
        sin = g.new(emb.shape, "float32", "sin")
        low_cos, low_sin = cast(g, cos, dtype), cast(g, sin, dtype)
        del freqs, emb, cos, sin
    shape = (1, 1, length, head_dim)
    return alias(low_cos, shape), alias(low_sin, shape)


def _llama_block(
    g: Graph,
    model: Model,
    block: Block,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    settings: Settings,
) -> Tensor:
    if block.npt is not None and settings.npt_block is not None:
        return settings.npt_block(
            block, hidden, lambda x: llama_attention(g, model, block, x, cos, sin, mask, settings)
        )
    residual = hidden
    with g.module("input_layernorm"):
        hidden = _norm(g, hidden, block.norms["input_layernorm.weight"], settings)
    hidden = llama_attention(g, model, block, hidden, cos, sin, mask, settings)
    hidden = add(g, residual, hidden, "residual stream")
    residual = hidden
    with g.module("post_attention_layernorm"):
        hidden = _norm(g, hidden, block.norms["post_attention_layernorm.weight"], settings)
    hidden = gated_mlp(g, block, hidden)
    hidden = add(g, residual, hidden, "residual stream")
    return hidden


def llama_attention(
    g: Graph,
    model: Model,
    block: Block,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    settings: Settings,
) -> Tensor:
    architecture, linears = model.architecture, block.linears
    heads, kv_heads, head_dim = (
        architecture.num_attention_heads, architecture.num_key_value_heads, architecture.head_dim,
    )  # fmt: skip
    fused_lora = settings.behaviour.fused_lora
    if fused_lora and fuses(block, *QKV):
        query, key, value = fused_qkv(g, hidden, block)
        query, key = split_heads(g, query, heads, head_dim), split_heads(g, key, kv_heads, head_dim)
        value = split_heads(g, value, kv_heads, head_dim)
    else:
        if architecture.qk_norm:
            query = _normed_heads(g, block, hidden, "q", heads, head_dim, settings)
            key = _normed_heads(g, block, hidden, "k", kv_heads, head_dim, settings)
        else:
            query = split_heads(g, linear(g, hidden, linears["self_attn.q_proj"]), heads, head_dim)
            key = split_heads(g, linear(g, hidden, linears["self_attn.k_proj"]), kv_heads, head_dim)
        value = split_heads(g, linear(g, hidden, linears["self_attn.v_proj"]), kv_heads, head_dim)
    with g.module("self_attn"):
        if settings.behaviour.triton_rotary:
            query, key = triton_rotary(g, query), triton_rotary(g, key)
        else:
            query, key = rotary(g, query, key, cos, sin)
        if settings.behaviour.use_cache:
            key, value = _cached(g, block, key, settings), _cached(g, block, value, settings)
        output = attention(
            g, query, key, value,
            implementation=settings.attention, mask=mask, probability=architecture.attention_dropout,
            padded=settings.behaviour.padding_mask, repeat_heads=settings.behaviour.repeat_key_heads,
            before_ampere=settings.behaviour.before_ampere,
        )  # fmt: skip
    if fused_lora and fuses(block, OUTPUT):
        output = fused_output(g, output, block)
    else:
        output = linear(g, output, linears["self_attn.o_proj"])
    return output


def _normed_heads(
    g: Graph, block: Block, hidden: Tensor, which: str, heads: int, head_dim: int, settings: Settings
) -> Tensor:
    projected = linear(g, hidden, block.linears[f"self_attn.{which}_proj"])
    batch, length, _ = projected.shape
    with g.module(f"self_attn.{which}_norm"):
        per_head = reshape(g, projected, (batch, length, heads, head_dim))
        del projected
        return swap_heads(g, _norm(g, per_head, block.norms[f"self_attn.{which}_norm.weight"], settings))


def _cached(g: Graph, block: Block, states: Tensor, settings: Settings) -> Tensor:
    """DynamicCache.update: the states concatenated to an empty cache, which keeps them."""
    cached = concatenate(g, (states,), states.shape, "cache")
    settings.cache.append((block.layer, cached))
    return cached


def gated_mlp(g: Graph, block: Block, x: Tensor) -> Tensor:
    linears = block.linears
    gated = mul(
        g,
        activation(g, linear(g, x, linears["mlp.gate_proj"]), "silu"),
        linear(g, x, linears["mlp.up_proj"]),
        "gated",
    )
    return linear(g, gated, linears["mlp.down_proj"])


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


# -- GPT-2 -------------------------------------------------------------------------------------------------


def _gpt2_decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    assert model.positions is not None
    architecture = model.architecture
    with g.module("transformer"):
        with g.module("wte"):
            inputs_embeds = embedding(g, ids, model.embedding)
        if settings.behaviour.input_gradients:
            inputs_embeds = _leaf(inputs_embeds)
        position_ids = alias(_positions(g, ids.shape[1]), (1, ids.shape[1]))
        with g.module("wpe"):
            position_embeds = embedding(g, position_ids, model.positions)
        hidden = add(g, inputs_embeds, position_embeds, "embeddings")
        mask = causal_mask(g, ids.shape, hidden.dtype) if settings.attention == "eager" else None
        hidden = dropout(g, hidden, architecture.embedding_dropout)
        with g.module("h"):
            held = [hidden]
            del hidden  # the loop over the blocks is the only one that holds their input
            hidden = run_blocks(
                g,
                model,
                held.pop(),
                settings,
                lambda block, x: _gpt2_block(g, model, block, x, mask, settings),
            )
        with g.module("ln_f"):
            hidden = layer_norm(g, hidden, model.final_norm["weight"], model.final_norm["bias"])
        del inputs_embeds, position_ids, position_embeds
        return hidden


def _gpt2_block(
    g: Graph, model: Model, block: Block, hidden: Tensor, mask: Tensor | None, settings: Settings
) -> Tensor:
    if block.npt is not None and settings.npt_block is not None:
        return settings.npt_block(block, hidden, lambda x: gpt2_attention(g, model, block, x, mask, settings))
    residual = hidden
    with g.module("ln_1"):
        hidden = layer_norm(g, hidden, block.norms["ln_1.weight"], block.norms["ln_1.bias"])
    output = gpt2_attention(g, model, block, hidden, mask, settings)
    hidden = add(g, output, residual, "residual stream")
    residual = hidden
    with g.module("ln_2"):
        hidden = layer_norm(g, hidden, block.norms["ln_2.weight"], block.norms["ln_2.bias"])
    feed_forward = gpt2_mlp(g, model, block, hidden)
    hidden = add(g, residual, feed_forward, "residual stream")
    return hidden


def gpt2_attention(
    g: Graph, model: Model, block: Block, hidden: Tensor, mask: Tensor | None, settings: Settings
) -> Tensor:
    architecture = model.architecture
    heads, head_dim = architecture.num_attention_heads, architecture.head_dim
    projected = linear(g, hidden, block.linears["attn.c_attn"])
    query, key, value = _split_three(g, projected, heads, head_dim)
    del projected
    with g.module("attn"):
        if settings.behaviour.use_cache:
            key, value = _cached(g, block, key, settings), _cached(g, block, value, settings)
        output = attention(
            g, query, key, value,
            implementation=settings.attention, mask=mask, probability=architecture.attention_dropout,
            softmax_in_float32=False, padded=settings.behaviour.padding_mask,
            before_ampere=settings.behaviour.before_ampere,
        )  # fmt: skip
    output = linear(g, output, block.linears["attn.c_proj"])
    output = dropout(g, output, architecture.residual_dropout)
    return output


def _split_three(g: Graph, projected: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """`split(d, dim=2)` and the view as heads; backward writes the three gradients into one tensor with `cat`."""
    batch, length, _ = projected.shape
    shape = (batch, heads, length, head_dim)
    views = tuple(alias(projected, shape, transposed=True) for _ in range(3))
    if g.needs(projected):
        node = None
        for slot, view in enumerate(views):
            if node is None:
                node = g.record(view, (projected,), [], _split_three_backward, projected.shape)
            view.node, view.slot, view.needs_grad = node, slot, True
    return views  # type: ignore[return-value]


def _split_three_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    return [g.new(node.extra, gradients[0].dtype, "grad of query, key and value")]


def gpt2_mlp(g: Graph, model: Model, block: Block, x: Tensor) -> Tensor:
    x = linear(g, x, block.linears["mlp.c_fc"])
    x = activation(g, x, model.architecture.hidden_act)
    x = linear(g, x, block.linears["mlp.c_proj"])
    return dropout(g, x, model.architecture.residual_dropout)
