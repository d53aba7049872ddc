"""What most decoders do around their blocks: embedding, positions, masks, rotary tables, the last norm."""

from __future__ import annotations

from collections.abc import Callable

from memplan.tape.graph import Graph
from memplan.tape.modules import entered, left
from memplan.tape.norms import embedding
from memplan.tape.ops import dropout, scale
from memplan.tape.parts import Model
from memplan.tape.programs.blocks import Given, RunBlock, Settings, run_blocks
from memplan.tape.programs.layers import leaf, rotary_table
from memplan.tape.programs.masks import attention_mask, positions
from memplan.tape.sharded.fsdp2_accelerate import embedding_begins, embedding_ends, norm_begins
from memplan.tape.tensors import Tensor

LastNorm = Callable[[Graph, Model, Tensor, Settings], Tensor]

MASKS_BY_KIND = ("qwen2", "qwen3", "gemma2", "gemma3_text", "olmo3")
"""Families whose `forward` keeps a dictionary of masks, with a full one whether any block takes it or not."""
TABLES_BY_KIND = ("gemma3_text", "olmo3")
"""Families that turn by other angles in blocks that slide."""


def run_decoder(
    g: Graph,
    model: Model,
    ids: Tensor,
    settings: Settings,
    block: RunBlock,
    last_norm: LastNorm,
    *,
    modules: tuple[str, str, str] = ("model", "layers", "norm"),
    embed: Callable[[Graph, Model, Tensor], Tensor] | None = None,
    table_dtype: str | None = None,
    always_masked: bool = False,
    scales_embedding: bool = False,
) -> Tensor:
    """
    Hidden states (B, S, d) after the last norm. `modules` names the model, its list of blocks and its last norm;
    `table_dtype` is that of the rotary tables, the hidden states' if None; `always_masked`: sdpa is given a mask
    wherever it could do without; `scales_embedding`: the model multiplies what its embedding returns.
    """
    architecture = model.architecture
    outer, layers, norm = modules
    entered(g, outer)
    with g.module(outer):
        embedding_begins(g)
        inputs_embeds = (
            embedding(g, ids, model.current_embedding(g)) if embed is None else embed(g, model, ids)
        )
        embedding_ends(g, inputs_embeds)
        if settings.behaviour.input_gradients:
            inputs_embeds = leaf(inputs_embeds, settings)
            if g.hooks is not None:
                inputs_embeds = g.hooks.leave(("embedding", model.embedding), inputs_embeds)
        if scales_embedding:
            inputs_embeds = scale(g, inputs_embeds, "scaled embeddings")
        dtype = inputs_embeds.dtype
        position_ids = positions(g, ids.shape[1], settings)
        masks = _masks(g, model, ids, dtype, settings, always_masked)
        held = [dropout(g, inputs_embeds, architecture.embedding_dropout)]
        tables = _tables(g, model, position_ids, table_dtype or dtype, settings)
        given = {
            kind: Given(masks[kind], tables[kind], position_ids) for kind in architecture.attention_kinds
        }
        with g.module(layers):
            hidden = run_blocks(
                g,
                model,
                held.pop(),  # the loop over the blocks is the only one that holds their input
                settings,
                block,
                given,
            )
        with g.module(norm):
            norm_begins(g, hidden)
            hidden = last_norm(g, model, hidden, settings)
        del given
        if architecture.family in MASKS_BY_KIND:
            del masks, inputs_embeds  # a dictionary goes with its items in order
        del position_ids
        return left(g, outer, hidden)


def _masks(
    g: Graph, model: Model, ids: Tensor, dtype: str, settings: Settings, always: bool
) -> dict[str, Tensor | None]:
    """By kind of block."""
    architecture = model.architecture
    window = architecture.sliding_window
    masks: dict[str, Tensor | None] = {}
    if window is None or architecture.family in MASKS_BY_KIND:
        masks["full_attention"] = attention_mask(g, ids.shape, dtype, settings, always=always)
    if window is not None:
        masks["sliding_attention"] = attention_mask(g, ids.shape, dtype, settings, window)
    return masks


def _tables(
    g: Graph, model: Model, position_ids: Tensor, dtype: str, settings: Settings
) -> dict[str, tuple[Tensor, Tensor]]:
    """Cosines and sines by kind of block."""
    architecture = model.architecture
    kinds, size = architecture.attention_kinds, architecture.rotary_dim or architecture.head_dim

    def table() -> tuple[Tensor, Tensor]:
        by_product = settings.behaviour.rotary_product
        return rotary_table(g, position_ids.shape, size, dtype, by_product=by_product)

    if architecture.family in TABLES_BY_KIND:
        return {kind: table() for kind in kinds}
    return dict.fromkeys(kinds, table())
