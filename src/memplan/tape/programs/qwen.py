"""
Qwen 1 (modeling_qwen.py beside the weights of Qwen/Qwen-7B on the hub, December 2023).

With the flash-attn package its kernels for attention and rotary positions run, those of flash-attn 2.3.3, which the
repository's Dockerfile installs; without it, torch's scaled dot product under a mask that every block makes. The norm
of `csrc/layer_norm`, an extension of the package that has to be built apart, is not planned.
"""

from __future__ import annotations

from functools import partial

from memplan.errors import JobError
from memplan.tape.backends import Call
from memplan.tape.graph import Graph
from memplan.tape.linear import linear
from memplan.tape.modules import called, entered, hooked, left
from memplan.tape.norms import embedding, normalised
from memplan.tape.ops import (
    add,
    alias,
    cast,
    concatenate,
    dropout,
    merge_heads,
    mul,
    narrow_last,
    negate,
    split_heads,
    unary_saving_input,
)
from memplan.tape.parts import Block, Model
from memplan.tape.programs.blocks import Given, Settings, run_blocks
from memplan.tape.programs.layers import leaf
from memplan.tape.quantized import FUNCTIONS_OWN_GRADIENTS
from memplan.tape.sdpa import merged_copy, run_kernel, run_math
from memplan.tape.tensors import Gradients, Node, Tensor
from memplan.tape.views import split_last, unbound_halves, whole_slices

SIXTEEN_BITS = ("bfloat16", "float16")


def decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    _refuse_what_does_not_run(g, model, ids, settings)
    entered(g, "transformer")
    with g.module("transformer"):
        position_ids = g.new((ids.shape[1],), "int64", "positions")
        with g.module("wte"):
            inputs_embeds = embedding(g, ids, model.current_embedding(g))
        if settings.behaviour.input_gradients:
            inputs_embeds = leaf(inputs_embeds, settings)
            if g.hooks is not None:
                inputs_embeds = g.hooks.leave(("embedding", model.embedding), inputs_embeds)
        table = _rotary_table(g, model, ids.shape[1], settings)
        held = [dropout(g, inputs_embeds, model.architecture.embedding_dropout)]
        given = dict.fromkeys(model.architecture.attention_kinds, Given(None, table))
        with g.module("h"):
            outputs = run_blocks(g, model, held.pop(), settings, _block, given)
        with g.module("ln_f"):
            hidden = _norm(g, outputs, model.outside["transformer.ln_f.weight"])
        del outputs, given, table, inputs_embeds, position_ids
        return left(g, "transformer", hidden)


def _refuse_what_does_not_run(g: Graph, model: Model, ids: Tensor, settings: Settings) -> None:
    name = model.architecture.name
    if settings.attention == "eager":
        raise JobError(
            f"`{name}` has no eager attention under torch 2: without the flash-attn package its code calls torch's",
            hint="use `--set attention=sdpa`, or `flash_attention_2`",
        )
    is_package = settings.attention == "flash_attention_2"
    if is_package and model.embedding.stored_dtype not in SIXTEEN_BITS:
        raise JobError(
            f"the code of `{name}` leaves flash attention out where its weights are float32",
            hint="use `--set attention=sdpa`, or `--set dtype=bfloat16`",
        )
    if settings.behaviour.padding_mask and (ids.shape[0] > 1 or not is_package):
        raise JobError(
            f"batches of `{name}` that hold padding are planned for one sequence with `attention: flash_attention_2`: "
            "of several it gathers as many tokens as are no padding, and without the package it adds up two masks",
            hint="use `--set micro_batch_size=1 --set attention=flash_attention_2`",
        )


def _rotary_table(g: Graph, model: Model, length: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """
    RotaryEmbedding.update_rotary_pos_emb_cache: cosines and sines of twice as many positions as the longest batch so
    far has, in float32; the model keeps them, and the frequencies that they were made with.
    """
    size = model.architecture.head_dim
    if settings.rotary_cache is None or settings.rotary_cache[0] < length:
        rows = max(2 * length, 16)
        with g.module("rotary_emb"):
            frequencies = _frequencies(g, size // 2)
            model.buffers["transformer.rotary_emb.inv_freq"] = frequencies
            positions = g.new((rows,), "int64", "positions")
            products = g.new((rows,), "float32", "positions")
            products = g.new((rows, size // 2), "float32", "products")
            angles = g.new((1, rows, 1, size), "float32", "angles")
            cos, sin = (g.new(angles.shape, "float32", name, "weights") for name in ("cos", "sin"))
            settings.rotary_cache = (rows, cos, sin)
            del positions, products, angles, cos, sin, frequencies
    return settings.rotary_cache[1:]


def _frequencies(g: Graph, count: int) -> Tensor:
    """`1.0 / base ** (torch.arange(0, 2 * count, 2).float() / (2 * count))`"""
    made = g.new((count,), "int64", "channels")
    for name in ("channels", "exponents", "powers", "frequencies", "frequencies"):
        made = g.new((count,), "float32", name, "weights")
    return made


def _block(g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings) -> Tensor:
    with g.module("ln_1"):
        normed = _norm(g, hidden, block.norms["ln_1.weight"])
    attended = _attention(g, model, block, normed, given, settings)
    summed = add(g, attended, hidden, "residual stream")
    with g.module("ln_2"):
        normed = _norm(g, summed, block.norms["ln_2.weight"])
    fed_forward = _mlp(g, block, normed)
    return add(g, summed, fed_forward, "residual stream")


@called("attention")
def _attention(
    g: Graph, model: Model, block: Block, hidden: Tensor, given: Given, settings: Settings
) -> Tensor:
    architecture = model.architecture
    heads, head_dim = architecture.num_attention_heads, architecture.head_dim
    projected = linear(g, hidden, block.linears["attn.c_attn"])
    with g.module("attn"):
        query, key, value = (
            split_heads(g, part, heads, head_dim)
            for part in split_last(g, projected, (architecture.hidden_size,) * 3)
        )
        length = query.shape[-2]
        turn = _turned_by_package if settings.attention == "flash_attention_2" else _turned
        query, key = turn(g, query, given.table, length), turn(g, key, given.table, length)
        if settings.behaviour.use_cache:  # which is the states themselves
            for states in (key, value):
                settings.remember(g, block.layer, alias(states))
        run = _package if settings.attention == "flash_attention_2" else _scaled_dot_product
        merged, mask = run(g, query, key, value)
    return linear(g, merged, block.linears["attn.c_proj"])


def _package(g: Graph, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """FlashSelfAttention, of rows without padding."""
    batch = query.shape[0]
    if batch == 1:
        return merge_heads(g, run_kernel(g, "package", query, key, value, masked=False)), None
    starts = [g.new((batch + 1,), "int32", "beginnings of rows") for _ in range(2)]  # of queries and of keys
    out = run_kernel(g, "package", query, key, value, masked=False, starts=starts)
    return merge_heads(g, out), None


def _scaled_dot_product(g: Graph, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Under a mask for all rows that the block makes, which its local variables hold to the end of attention."""
    length = query.shape[-2]
    ones = g.new((length, length), "bool", "mask of ones")
    mask = g.new((length, length), "bool", "causal mask")
    del ones
    dtype = g.autocast or query.dtype
    query, key, value = cast(g, query, dtype), cast(g, key, dtype), cast(g, value, dtype)
    kernel = g.target.kernel_for(Call(dtype=dtype, head_dim=query.shape[-1], masked=True))
    if kernel == "math":
        out = run_math(g, query, key, value, 0.0, masked=True, mask_rows=1)
        return merged_copy(g, out), mask
    return merge_heads(g, run_kernel(g, kernel, query, key, value, masked=True, mask_rows=1)), mask


def _turned(g: Graph, x: Tensor, table: tuple[Tensor, ...], length: int) -> Tensor:
    """apply_rotary_pos_emb in torch's operations: float32, in two parts of which one is empty."""
    cos, sin = (alias(part, (1, 1, length, x.shape[-1])) for part in table)
    wide = cast(g, x, "float32")
    turned, rest = whole_slices(g, wide, 1), narrow_last(g, wide, 0)
    turned = add(g, mul(g, turned, cos), mul(g, _rotated_halves(g, turned), sin), "turned channels")
    return cast(g, concatenate(g, (turned, rest), wide.shape, "turned heads"), x.dtype)


def _rotated_halves(g: Graph, x: Tensor) -> Tensor:
    first, second = unbound_halves(g, x)
    return concatenate(g, (negate(g, second, "negated half"), first), x.shape, "rotated halves")


def _turned_by_package(g: Graph, x: Tensor, table: tuple[Tensor, ...], length: int) -> Tensor:
    """flash_attn/layers/rotary.py, ApplyRotaryEmb: half of the table is copied for the call, in backward too."""
    wide = cast(g, x, "float32")
    shape = (length, x.shape[-1] // 2)
    copies = _copied(g, shape)
    turned = g.new(wide.shape, "float32", "turned heads", transposed=wide.transposed)
    copies.clear()
    if g.needs(wide):
        g.record(turned, (wide,), list(table), partial(_turned_back, shape=shape))
    return cast(g, turned, x.dtype)


def _copied(g: Graph, shape: tuple[int, int]) -> list[Tensor]:
    return [g.new(shape, "float32", f"{name} of one half", "workspace") for name in ("cos", "sin")]


def _turned_back(
    g: Graph,
    node: Node,
    gradients: dict[int, Tensor],
    saved: list[Tensor | None],
    *,
    shape: tuple[int, int],
) -> Gradients:
    """The gradient is cloned, for the sake of Triton 2.0."""
    given = gradients[0]
    clone = g.new(given.shape, given.dtype, "copy of grad", transposed=given.transposed)
    copies = _copied(g, shape)
    out = g.new(given.shape, given.dtype, "grad of heads", transposed=given.transposed)
    copies.clear()
    del clone, given
    if g.target.torch >= FUNCTIONS_OWN_GRADIENTS:
        gradients.clear()
    return [out]


@hooked
def _norm(g: Graph, x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm: in float32, and times the weight in the dtype of x."""
    return mul(g, cast(g, normalised(g, cast(g, x, "float32")), x.dtype), weight, "output")


@called("mlp")
def _mlp(g: Graph, block: Block, x: Tensor) -> Tensor:
    """`w1` is what is gated, `w2` the gate."""
    linears = block.linears
    states = linear(g, x, linears["mlp.w1"])
    gate = linear(g, x, linears["mlp.w2"])
    with g.module("mlp"):
        gated = mul(g, states, unary_saving_input(g, gate, "silu"), "gated")
    return linear(g, gated, linears["mlp.c_proj"])
