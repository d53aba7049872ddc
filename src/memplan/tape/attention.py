"""
Attention: rotary positions and the three implementations of transformers, with the scratch of their kernels.

Which kernel `sdpa` picks depends on the device, the dtype and the mask; `choose_kernel` says which we assume and why.
"""

from __future__ import annotations

from math import prod

from memplan.tape.engine import ITEMSIZE, Gradients, Graph, Node, Tensor
from memplan.tape.ops import add, alias, cast, concatenate, dropout, mul, narrow_last, negate, reshape, scale


def rotate_half(g: Graph, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first = narrow_last(g, x, half)
    second = narrow_last(g, x, half)
    return concatenate(g, (negate(g, second, "negated half"), first), x.shape, "rotated halves")


def rotary(g: Graph, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb of transformers: (B, H, S, D) each, cos and sin (1, 1, S, D)."""
    query_embedded = add(g, mul(g, query, cos), mul(g, rotate_half(g, query), sin), "rotary query")
    key_embedded = add(g, mul(g, key, cos), mul(g, rotate_half(g, key), sin), "rotary key")
    return query_embedded, key_embedded


def choose_kernel(
    implementation: str,
    device: str,
    dtype: str,
    masked: bool,
    head_dim: int,
    *,
    dropout: bool = False,
    before_ampere: bool = False,
) -> str:
    """
    The kernel behind `attention`, for a causal call without explicit mask unless `masked`.

    * CUDA, 16-bit, no mask, head_dim <= 256: flash, as torch prefers it on sm80 to sm89 and sm120; on Hopper some
      versions of torch prefer cuDNN, whose workspace is not public.
    * CUDA, float32 or a mask: memory-efficient. Before sm80 there is no flash kernel, and the memory-efficient one
      takes no bfloat16: then the composite one.
    * CPU: torch's own flash kernel for all dtypes; with dropout the composite one.
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; transformers' flash_attention_2 calls the same kernel of
    the flash-attn package.)
    """
    if implementation == "eager":
        return "eager"
    if device == "cpu":
        return "math" if dropout else "flash_cpu"
    if implementation == "flash_attention_2":
        return "flash"
    if before_ampere:
        return "math" if dtype == "bfloat16" else "efficient"
    if dtype in ("float16", "bfloat16") and not masked and head_dim <= 256:
        return "flash"
    return "efficient"


def attention(
    g: Graph,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    implementation: str,
    mask: Tensor | None,
    probability: float,
    softmax_in_float32: bool = True,
    padded: bool = False,
    repeat_heads: bool = False,
    before_ampere: bool = False,
) -> Tensor:
    """
    (B, H, S, D) queries against (B, H_kv, S, D) keys and values: (B, S, H*D), before the output projection.

    `padded`: sdpa is given a mask; `repeat_heads`: the caller copies key and value heads whatever the kernel
    takes; `before_ampere`: the card is older than sm80. transformers copies the heads where there is a mask, and
    else leaves groups of heads to the kernel (integrations/sdpa_attention.py, use_gqa_in_sdpa).
    """
    if implementation == "eager":
        return _eager(g, query, key, value, mask, probability, softmax_in_float32)
    groups = query.shape[1] // key.shape[1]
    if repeat_heads and groups > 1:
        key, value = _repeat(g, key, groups), _repeat(g, value, groups)
    dtype = g.autocast or query.dtype
    if implementation == "flash_attention_2" and dtype == "float32" and g.device == "cuda":
        dtype = "bfloat16"  # fa_peft_integration_check: float32 norms of k-bit preparation made it float32
    query, key, value = cast(g, query, dtype), cast(g, key, dtype), cast(g, value, dtype)
    kernel = choose_kernel(
        implementation, g.device, dtype, padded, query.shape[-1],
        dropout=probability > 0, before_ampere=before_ampere,
    )  # fmt: skip
    if kernel == "efficient" and groups > 1 and not repeat_heads and not padded:
        kernel = "math"  # enable_gqa, which the memory-efficient kernel has not
    if kernel == "math":
        return _math(g, query, key, value, probability)
    if kernel == "flash":
        out = _flash(g, query, key, value)
    elif kernel == "flash_cpu":
        out = _flash_cpu(g, query, key, value)
    else:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = _repeat(g, key, groups), _repeat(g, value, groups)
        out = _efficient(g, query, key, value, padded)
    batch, heads, length, head_dim = query.shape
    del query, key, value
    merged = alias(out, (batch, length, heads * head_dim), transposed=False)
    if g.needs(out):
        g.record(merged, (out,), [], _merged_backward, out.shape)
    return merged


def _merged_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [alias(gradients[0], node.extra, transposed=True)]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _flash(g: Graph, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """_scaled_dot_product_flash_attention: output, log-sum-exp (B, H, S) in float32, two RNG scalars."""
    batch, heads, length, _ = query.shape
    out = g.new(query.shape, query.dtype, "attention output", transposed=True)
    log_sum_exp = g.new((batch, heads, length), "float32", "log-sum-exp")
    seed = g.new((2,), "int64", "rng state")
    offset = g.new((), "int64", "rng state")
    if g.needs(query, key, value):
        saved = [offset, seed, alias(out), log_sum_exp, value, query, key]
        g.record(out, (query, key, value), saved, _flash_backward)
    return out


def _flash_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """
    Gradients of q, k, v; inside, row sums and a float32 accumulator of dQ padded to 128 rows and 32 (64) columns, and
    with fewer key heads than query heads dK and dV per query head
    (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd).
    """
    query, key = saved[-2], saved[-1]
    assert query is not None and key is not None
    outputs = _attention_gradients(g, node, saved)
    batch, heads, length, head_dim = query.shape
    rows, columns = _round_up(length, 128), _round_up(head_dim, 32 if head_dim <= 128 else 64)
    scratch = [batch * heads * rows * 4, batch * rows * heads * columns * 4]
    if key.shape[1] != heads:
        scratch += [batch * key.shape[2] * heads * head_dim * ITEMSIZE[query.dtype]] * 2
    g.scratch(*scratch, name="flash attention backward")
    return outputs


def _attention_gradients(g: Graph, node: Node, saved: list[Tensor | None]) -> Gradients:
    """Of (query, key, value), which are saved last, in the order value, query, key."""
    outputs: Gradients = []
    for tensor, name in ((saved[-2], "query"), (saved[-1], "key"), (saved[-3], "value")):
        assert tensor is not None
        outputs.append(g.new(tensor.shape, tensor.dtype, f"grad of {name}", transposed=tensor.transposed))
    return outputs


def _flash_cpu(g: Graph, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """
    _scaled_dot_product_flash_attention_for_cpu: output and log-sum-exp (B, S, H) in float32; inside, a tile of scores,
    a row of maxima and sums and an accumulator per thread, which we do not count (a few hundred KiB).
    (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp)
    """
    batch, heads, length, _ = query.shape
    out = g.new(query.shape, query.dtype, "attention output", transposed=True)
    log_sum_exp = g.new((batch, length, heads), "float32", "log-sum-exp")
    if g.needs(query, key, value):
        g.record(out, (query, key, value), [alias(out), log_sum_exp, value, query, key], _flash_cpu_backward)
    return out


def _flash_cpu_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    return _attention_gradients(g, node, saved)


def _efficient(g: Graph, query: Tensor, key: Tensor, value: Tensor, masked: bool) -> Tensor:
    """
    _scaled_dot_product_efficient_attention: output and a float32 log-sum-exp padded to 32 rows. A bool mask becomes
    one in the dtype of the query, (B, 1, S, S) with rows padded to 8 elements, at every call, which backward keeps
    (convert_boolean_attn_mask and preprocess_mask in aten/src/ATen/native/transformers/attention.cpp).
    """
    batch, heads, length, _ = query.shape
    bias = None
    if masked:
        padded_length = _round_up(length, 8)
        bias = g.new((batch, 1, length, length), query.dtype, "attention bias")
        if padded_length != length:
            bias = g.new((batch, 1, length, padded_length), query.dtype, "padded attention bias")
    out = g.new(query.shape, query.dtype, "attention output", transposed=True)
    needed = g.needs(query, key, value)
    rows = _round_up(length, 32) if needed else 0
    log_sum_exp = g.new((batch, heads, rows), "float32", "log-sum-exp")
    seed = g.new((), "int64", "rng state")
    offset = g.new((), "int64", "rng state")
    if needed:
        saved = [bias, offset, seed, alias(out), log_sum_exp, value, query, key]
        g.record(out, (query, key, value), saved, _efficient_backward)
    return out


def _efficient_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """
    Row sums, and for 16-bit inputs float32 accumulators of dQ, above 64 columns also of dK and dV
    (aten/src/ATen/native/transformers/cuda/attention_backward.cu; an upper estimate, key splits are not modelled).
    """
    query, key = saved[-2], saved[-1]
    assert query is not None and key is not None
    outputs = _attention_gradients(g, node, saved)
    batch, heads, length, head_dim = query.shape
    scratch = [batch * heads * length * 4]
    if ITEMSIZE[query.dtype] < 4:
        rows, key_rows = _round_up(length, 64), _round_up(key.shape[2], 64)
        elements = rows * _round_up(head_dim, 32)
        if head_dim > 64:
            elements += 2 * key_rows * _round_up(head_dim, 64)
        scratch.append(batch * heads * elements * 4)
    g.scratch(*scratch, name="efficient attention backward")
    return outputs


def _repeat(g: Graph, x: Tensor, groups: int) -> Tensor:
    """repeat_kv: key and value heads copied once per query head of their group; backward sums over the copies."""
    batch, heads, length, head_dim = x.shape
    out = g.new((batch, heads * groups, length, head_dim), x.dtype, "repeated heads")
    if g.needs(x):
        g.record(out, (x,), [], _repeat_backward, x.shape)
    return out


def _repeat_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [g.new(node.extra, gradients[0].dtype, "sum over repeated heads")]


def _eager(
    g: Graph,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    probability: float,
    softmax_in_float32: bool,
) -> Tensor:
    """
    eager_attention_forward of transformers: scores, mask, softmax, cast, dropout, all materialised. The Llama
    family's softmax is in float32, GPT-2's in the dtype of the scores.
    """
    groups = query.shape[1] // key.shape[1]
    key_states = _repeat(g, key, groups) if groups > 1 else key
    value_states = _repeat(g, value, groups) if groups > 1 else value
    batch, heads, length, head_dim = query.shape
    scores = scale(g, batched_matmul(g, query, key_states, length), "scaled scores")
    if mask is not None:
        scores = add(g, scores, mask, "masked scores")
    scores = cast(g, softmax(g, scores, "float32" if softmax_in_float32 else scores.dtype), query.dtype)
    scores = dropout(g, scores, probability)
    out = batched_matmul(g, scores, value_states, head_dim)
    copied = g.new((batch, length, heads * head_dim), out.dtype, "merged heads")
    if g.needs(out):
        g.record(copied, (out,), [], _merged_backward, out.shape)
    return copied


def _math(g: Graph, query: Tensor, key: Tensor, value: Tensor, probability: float) -> Tensor:
    """
    _scaled_dot_product_attention_math: in float32 on CUDA, query and key scaled by themselves, a causal mask made
    per call, scores, softmax and dropout materialised, outside autocast
    (aten/src/ATen/native/transformers/attention.cpp).
    """
    batch, heads, length, head_dim = query.shape
    dtype, outer = query.dtype, g.autocast
    g.autocast = None
    if g.device == "cuda":
        query, key, value = cast(g, query, "float32"), cast(g, key, "float32"), cast(g, value, "float32")
    scaled_query = scale(g, query, "scaled query")
    ones = g.new((length, length), "bool", "causal mask")
    lower = g.new((length, length), "bool", "causal mask")
    del ones
    mask = g.new((length, length), query.dtype, "causal mask")
    del lower
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = _repeat(g, key, groups), _repeat(g, value, groups)
    scores = batched_matmul(g, scaled_query, scale(g, key, "scaled key"), length)
    # _safe_softmax keeps what it makes of the softmax, for rows that are all masked.
    inner = g.new(scores.shape, scores.dtype, "softmax") if g.device == "cuda" else None
    scores = softmax(g, scores, query.dtype)
    del inner
    scores = dropout(g, scores, probability)
    out = cast(g, batched_matmul(g, scores, value, head_dim), dtype)
    g.autocast = outer
    del mask
    merged = g.new((batch, length, heads * head_dim), out.dtype, "merged heads")
    if g.needs(out):
        g.record(merged, (out,), [], _merged_backward, out.shape)
    return merged


def _folded(g: Graph, x: Tensor) -> Tensor:
    """(B, H, ...) as (B*H, ...) for bmm: swapped heads of a single sequence are a view, of more a copy."""
    return reshape(g, x, x.shape) if x.transposed and x.shape[0] > 1 else x


def batched_matmul(g: Graph, a: Tensor, b: Tensor, columns: int) -> Tensor:
    """torch.matmul of (B, H, S, K) and (B, H, K, columns): operands that are not contiguous are copied for bmm."""
    dtype = g.autocast
    if dtype:
        a, b = cast(g, a, dtype), cast(g, b, dtype)
    left, right = _folded(g, a), _folded(g, b)
    out = g.new((*a.shape[:-1], columns), a.dtype, "output")
    if g.needs(left, right):
        saved = [left if right.needs_grad else None, right if left.needs_grad else None]
        g.record(out, (left, right), saved, product_backward, (a.shape, b.shape))
    return out


def product_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """Of any product of two operands whose shapes are in `extra`: the right one's gradient first."""
    gradient = gradients[0]
    shape_a, shape_b = node.extra
    edge_a, edge_b = node.edges
    grad_b = g.new(shape_b, gradient.dtype, "grad of operand") if edge_b is not None else None
    grad_a = g.new(shape_a, gradient.dtype, "grad of operand") if edge_a is not None else None
    return [grad_a, grad_b]


def softmax(g: Graph, x: Tensor, dtype: str) -> Tensor:
    """F.softmax(x, -1, dtype=dtype): to float32, float16 is converted inside the kernel, bfloat16 is cast first."""
    if g.autocast and g.device == "cuda":
        dtype = "float32"
    if x.dtype not in (dtype, "float16"):
        x = cast(g, x, dtype)
    out = g.new(x.shape, dtype, "attention weights")
    if g.needs(x):
        g.record(out, (x,), [alias(out)], _softmax_backward)
    return out


def _softmax_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    """_softmax_backward_data multiplies gradient and output into a temporary first (SoftMax.cu)."""
    gradient = gradients[0]
    out = g.new(gradient.shape, node.metadata[0][1], "grad of scores")
    if g.device == "cuda":
        g.scratch(prod(gradient.shape) * ITEMSIZE[gradient.dtype], name="softmax backward")
    return [out]
