"""Mixtral and Qwen3-MoE: Llama's and Qwen3's decoders with experts (transformers/models/{mixtral,qwen3_moe})."""

from __future__ import annotations

from memplan.tape.experts import (
    Folded,
    Stack,
    gather_rows,
    grouped_product,
    halves,
    masked_rows,
    normalized,
    sorted_by_expert,
    sum_of_choices,
    top_k,
)
from memplan.tape.graph import Graph
from memplan.tape.linear import linear_module
from memplan.tape.modules import called
from memplan.tape.ops import cast, mul, reshape
from memplan.tape.parts import Block, Model
from memplan.tape.products import softmax
from memplan.tape.programs.blocks import Settings
from memplan.tape.programs.layers import activation
from memplan.tape.programs.llama import decoder as llama_decoder
from memplan.tape.tensors import Tensor


def decoder(g: Graph, model: Model, ids: Tensor, settings: Settings) -> Tensor:
    return llama_decoder(g, model, ids, settings, mlp=_sparse_mlp)


@called("mlp")
def _sparse_mlp(g: Graph, model: Model, block: Block, x: Tensor, settings: Settings) -> Tensor:
    """MixtralSparseMoeBlock and Qwen3MoeSparseMoeBlock."""
    batch, length, width = x.shape
    behaviour = settings.behaviour
    with g.module("mlp"):
        flat = reshape(g, x, (batch * length, width))
        logits, weights, chosen = _router(g, model, block.stacks["mlp.gate"], flat)
        down, gate_up = (
            Folded(g, block.stacks[f"mlp.experts.{name}"], multiplied_out=behaviour.expert_deltas)
            for name in ("down_proj", "gate_up_proj")
        )
        masks = behaviour.expert_masks
        if g.hooks is None:
            out = _experts(g, model, gate_up, down, flat, chosen, weights, masks)
        else:
            key = ("experts", gate_up.stack.weight)
            out = g.hooks.run(
                key,
                [*gate_up.stack.parameters, *down.stack.parameters],
                (flat, weights),
                lambda x, scores: _experts(g, model, gate_up, down, x, chosen, scores, masks),
            )
        gate_up.drop_factors()
        gate_up.drop_weight()
        down.drop_weight()
        down.drop_factors()
        return reshape(g, out, x.shape)


def _router(g: Graph, model: Model, stack: Stack, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the weights of the chosen experts (Mixtral's are float32) and which they are."""
    architecture = model.architecture
    mixtral = architecture.family == "mixtral"
    with g.module("gate"):
        folded = Folded(g, stack)
        logits = linear_module(g, flat, folded.weight(), None, architecture.num_experts)
        # Mixtral casts to float32 itself, Qwen3 leaves it to softmax.
        probabilities = softmax(g, cast(g, logits, "float32") if mixtral else logits, "float32")
        weights, chosen = top_k(g, probabilities, architecture.experts_per_token)
        if mixtral or architecture.normalized_routing:
            weights = normalized(g, weights)
        if not mixtral:
            weights = cast(g, weights, logits.dtype)
        return logits, weights, chosen


def _experts(
    g: Graph,
    model: Model,
    gate_up: Folded,
    down: Folded,
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    masks: str,
) -> Tensor:
    """grouped_mm_experts_forward of transformers' integrations/moe.py; `masks` as `Behaviour.expert_masks`."""
    num_tokens = x.shape[0]
    num_rows = num_tokens * model.architecture.experts_per_token
    with g.module("experts"):
        flat_weights = reshape(g, weights, (num_rows,))
        ids, permutation = sorted_by_expert(g, reshape(g, chosen, (num_rows,)))
        rows = gather_rows(g, x, g.new((num_rows,), "int64", "token of each row"), "rows by expert")
        sorted_weights = gather_rows(g, flat_weights, permutation, "weights by expert")
        counted = g.new((num_rows,), "float32" if g.device == "cpu" else "int32", "expert ids to count")
        counts = g.new((model.architecture.num_experts,), counted.dtype, "tokens per expert")
        offsets = g.new(counts.shape, "int32", "ends of groups")
        mask = None if masks == "none" else g.new((num_rows, 1), "bool", "rows of other ranks")
        weight = gate_up.weight()
        if mask is not None:
            rows = masked_rows(g, rows, mask, in_place=True)
        out = grouped_product(g, rows, weight, offsets)
        del weight
        if mask is not None and masks == "products":
            out = masked_rows(g, out, mask, in_place=False)
        out = _gated(g, model, out)
        out = grouped_product(g, out, down.weight(), offsets)
        if mask is not None and masks == "products":
            out = masked_rows(g, out, mask, in_place=False)
        weighted = mul(g, out, reshape(g, sorted_weights, (num_rows, 1)), "weighted output of experts")
        inverse = g.new((num_rows,), "int64", "inverse permutation")
        g.scratch(num_rows * 8, name="row numbers")
        if mask is not None and masks == "sum":
            weighted = masked_rows(g, weighted, mask, in_place=True)
        weighted = gather_rows(g, weighted, inverse, "output of experts by token")
        final = sum_of_choices(g, weighted, num_tokens)
        return cast(g, final, x.dtype)


def _gated(g: Graph, model: Model, both: Tensor) -> Tensor:
    gate, up = halves(g, both)
    return mul(g, activation(g, gate, model.architecture.hidden_act), up, "gated")
