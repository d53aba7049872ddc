"""Attention: rotary positions, and the implementations of transformers."""

from __future__ import annotations

from memplan.tape.backends import Call
from memplan.tape.graph import Graph
from memplan.tape.ops import (
    add,
    cast,
    concatenate,
    dropout,
    merge_heads,
    mul,
    narrow_last,
    negate,
    scale,
    unary_saving_output,
)
from memplan.tape.products import batched_matmul, repeat_heads, softmax
from memplan.tape.sdpa import merged_copy, run_kernel, run_math
from memplan.tape.tensors import Tensor

MOST_GROUPED_CHANNELS = 256
"""Of a head, where transformers leaves groups of heads to sdpa."""


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


def partial_rotary(g: Graph, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb of Phi-3: the first channels turned, joined with the rest even where there is none."""
    size = cos.shape[-1]
    rest = query.shape[-1] - size
    turned_query, kept_query = narrow_last(g, query, size), narrow_last(g, query, rest)
    turned_key, kept_key = narrow_last(g, key, size), narrow_last(g, key, rest)
    parts = (_turned(g, turned_query, cos, sin), kept_query)
    query_embedded = concatenate(g, parts, query.shape, "rotary query")
    del parts
    parts = (_turned(g, turned_key, cos, sin), kept_key)
    key_embedded = concatenate(g, parts, key.shape, "rotary key")
    return query_embedded, key_embedded


def _turned(g: Graph, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return add(g, mul(g, x, cos), mul(g, rotate_half(g, x), sin), "turned channels")


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
    casts_weights: bool = True,
    causal: bool = True,
    softcapped: bool = False,
    padded: bool = False,
    repeated: bool = False,
    told_of_groups: bool = True,
    weights: list[Tensor] | None = None,
    positions_seen: bool = False,
    all_rows: bool = False,
) -> Tensor:
    """
    (B, H, S, D) queries against (B, H_kv, S, D) keys and values: (B, S, H*D), before the output projection.

    `mask`: added by eager attention, and given to sdpa where documents are packed or a window slides. `casts_weights`:
    eager attention gives its weights the dtype of the query; `causal`: a kernel without a mask makes one itself;
    `softcapped`: eager attention bounds the scores by a tanh; `padded`: sdpa is given a mask that is not on the tape;
    `repeated`: the caller copies key and value heads whatever the kernel takes; `weights` is given those of eager
    attention, which returns them. transformers copies the heads where there is a mask, and else leaves groups of heads
    to the kernel (integrations/sdpa_attention.py, use_gqa_in_sdpa). Not `told_of_groups`, sdpa finds unequal numbers
    of heads, which only the composite kernel takes, as a broadcast. `positions_seen`: the package is given positions;
    `all_rows`: they are looked at whatever the batch is (`Behaviour.checks_all_rows`).

    Raises JobError where the job names a kernel that does not take the call.
    """
    if implementation == "eager":
        return _eager(
            g, query, key, value, mask, probability, softmax_in_float32, casts_weights, softcapped, weights
        )
    groups = query.shape[1] // key.shape[1]
    masked = mask is not None
    padded = padded or masked
    too_wide = implementation == "sdpa" and query.shape[-1] > MOST_GROUPED_CHANNELS
    if told_of_groups and groups > 1 and (repeated or masked or too_wide):
        key, value = repeat_heads(g, key, groups), repeat_heads(g, value, groups)
        groups = 1
    is_package = implementation == "flash_attention_2" and g.device == "cuda"
    dtype = package_dtype(g, query) if is_package else g.autocast or query.dtype
    kernel = "package"
    if is_package:
        low_query, low_key, low_value = cast(g, query, dtype), cast(g, key, dtype), cast(g, value, dtype)
        if positions_seen and (all_rows or query.shape[0] == 1):
            _look_for_documents(g, query.shape[0], query.shape[-2])
    else:
        low_value = cast(g, value, dtype)  # autocast's arguments are evaluated from the last to the first
        low_key, low_query = cast(g, key, dtype), cast(g, query, dtype)
        kernel = g.target.kernel_for(
            Call(
                dtype=dtype,
                head_dim=query.shape[-1],
                masked=padded,
                dropout=probability > 0 and g.training,
                grouped=groups > 1 and told_of_groups and not padded,
                broadcast=groups > 1 and not told_of_groups,
            )
        )
    if kernel == "math":
        out = run_math(g, low_query, low_key, low_value, probability, masked, told_of_groups, causal=causal)
        del low_query, low_key, low_value
        merged = merged_copy(g, out)
        del out
        return merged
    if padded and groups > 1 and told_of_groups:
        low_key, low_value = repeat_heads(g, low_key, groups), repeat_heads(g, low_value, groups)
    out = run_kernel(g, kernel, low_query, low_key, low_value, masked=padded)
    del low_query, low_key, low_value
    return merge_heads(g, out)


def _look_for_documents(g: Graph, rows: int, length: int) -> None:
    """
    _is_packed_sequence of transformers/modeling_flash_attention_utils.py: positions (1, S) beside those that a row of
    one document has; of several rows nothing is compared in the end.
    """
    first = g.new((length,), "int64", "row numbers", "workspace")
    smallest = g.new((), "int64", "smallest position", "workspace")
    expected = g.new((length,), "int64", "positions of one document", "workspace")
    del first, smallest
    if rows == 1:
        difference = g.new((rows, length), "int64", "difference of positions", "workspace")
        distance = g.new((rows, length), "int64", "distance of positions", "workspace")
        del difference
        total = g.new((), "int64", "distance of all positions", "workspace")
        del distance
        g.new((), "bool", "whether documents are packed", "workspace")
        del total
    del expected


def package_dtype(g: Graph, query: Tensor) -> str:
    """
    What the flash-attn package is given: float32 norms of k-bit preparation make queries float32, which it does not
    take (transformers/modeling_flash_attention_utils.py, fa_peft_integration_check).
    """
    dtype = g.autocast or query.dtype
    return "bfloat16" if dtype == "float32" else dtype


def _eager(
    g: Graph,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    probability: float,
    softmax_in_float32: bool,
    casts_weights: bool,
    softcapped: bool,
    weights: list[Tensor] | None,
) -> Tensor:
    """
    eager_attention_forward of transformers: scores, Gemma's softcapping, mask, softmax, cast, dropout, all
    materialised. The Llama family's softmax is in float32, GPT-2's and BERT's in the dtype of the scores.
    """
    groups = query.shape[1] // key.shape[1]
    key_states = repeat_heads(g, key, groups) if groups > 1 else key
    value_states = repeat_heads(g, value, groups) if groups > 1 else value
    length, head_dim = query.shape[-2:]
    repeated = groups > 1 and key.shape[1] == 1
    scores = scale(
        g,
        batched_matmul(g, query, key_states, length, columns_first=True, repeated=repeated),
        "scaled scores",
    )
    if softcapped:
        scores = scale(g, scores, "scores over cap")
        scores = unary_saving_output(g, scores, "tanh of scores")
        scores = scale(g, scores, "capped scores")
    if mask is not None:
        scores = add(g, scores, mask, "masked scores")
    if softmax_in_float32:
        scores = cast(g, softmax(g, scores, "float32"), query.dtype)
    else:  # in two statements
        scores = softmax(g, scores, scores.dtype)
        if casts_weights:
            scores = cast(g, scores, query.dtype)
    scores = dropout(g, scores, probability)
    if weights is not None:
        weights.append(scores)
    out = batched_matmul(g, scores, value_states, head_dim, repeated=repeated)
    merged = merged_copy(g, out)
    del out
    return merged
