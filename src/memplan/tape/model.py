"""
A whole model in the order of loading: the base weights in module order, 4-bit layers packed one by one, then what the
method adds. Where FSDP2 cuts the model, shards come first, all of them, and are filled then.
"""

from __future__ import annotations

from functools import partial

from memplan.tape.added import attach_adapters, attach_npt
from memplan.tape.builder import Builder
from memplan.tape.checkpoint_size import checkpoint_bytes
from memplan.tape.linear_layer import Linear
from memplan.tape.packing import expected_bytes, make_map, prepare_kbit
from memplan.tape.parts import Model, linear_spec
from memplan.tape.sharded.accelerate_loading import broadcast
from memplan.tape.sharded.ddp import Buckets
from memplan.tape.sharded.fsdp1 import cut_flat
from memplan.tape.sharded.sharding import GATHER_STREAM, fill_shards
from memplan.tape.sharded.wrapping import upcast_shards, wrap_units
from memplan.tape.targets import copies


def build_model(builder: Builder, npt_layers: frozenset[int], checkpointed: frozenset[int]) -> Model:
    """`npt_layers` and `checkpointed`: indices of blocks."""
    g, job, architecture, modules = builder.g, builder.job, builder.architecture, builder.modules
    behaviour, layout = builder.behaviour, builder.layout
    g.begin("load")
    if behaviour.loads_on_device:
        room = checkpoint_bytes(architecture, job.dtype, partial(expected_bytes, job))
        g.scratch(room, name="room for the model's weights")
    tokens, *positions = modules.before
    outside = builder.outer((tokens,))
    embedding = next(iter(outside.values()))
    builder.keep_rows(embedding)
    of_tokens = [buffer for buffer in modules.buffers if buffer.name.startswith(f"{tokens.name}.")]
    others = [buffer for buffer in modules.buffers if buffer not in of_tokens]
    buffers = builder.buffers(of_tokens)
    if copies(job, tokens.name):
        g.persistent += builder.buffers(of_tokens).values()
    outside |= builder.outer(tuple(positions))
    if modules.buffers_before_blocks:
        buffers |= builder.buffers(others)
    if not builder.cuts_packed and not architecture.stored:
        make_map(g, job)
    blocks = [builder.block(layer, layer in checkpointed) for layer in builder.layers]
    g.begin("load_rest")
    *after, head_module = modules.after
    linears = {}
    for module in after:
        if module.role == "linear":
            linears[module.name] = builder.linear(linear_spec(module), None, "")
        else:
            outside |= builder.outer((module,))
    if not modules.buffers_before_blocks:
        buffers |= builder.buffers(others)
    spec = linear_spec(head_module)
    head = Linear(spec.path, spec.in_features, spec.out_features, embedding, dtype=job.dtype)
    head.bias = outside.get(modules.head_bias)
    if not architecture.tie_word_embeddings:
        head = builder.linear(spec, None, "")
        builder.keep_rows(head.weight)
    model = Model(architecture, blocks, embedding, head, outside, buffers, linears)
    _attach_and_cut(builder, model)
    fill_shards(g, builder.whole)
    attach_npt(builder, model, npt_layers)
    if builder.flat:
        g.flat_gradients = None if layout.gathers else GATHER_STREAM
        shards = wrap_units(g, builder.to_wrap, builder.layers, layout.parameters)
        builder.wrapped = upcast_shards(g, builder.to_wrap, builder.layers, layout.parameters, shards)
        g.persistent += shards
    if builder.full:
        model.trainable = list(builder.base)
    builder.contents.sort()
    if builder.flat and layout.gathers:
        cut_flat(builder.contents, behaviour.rank, layout.optimizer, each=not builder.full)
    # The gradients of NPT are added up by the trainer itself.
    if layout.replicas > 1 and not (layout.gathers or builder.flat or job.method == "npt"):
        if job.loop == "hf_trainer":
            broadcast(g, builder.sent, builder.layers)
        model.buckets = Buckets(g, model.trainable, builder.layers, behaviour.clones_output)
    return model


def _attach_and_cut(builder: Builder, model: Model) -> None:
    """What the method adds, before or after what is loaded is prepared for training and cut."""
    g = builder.g
    if builder.cuts_whole:
        if builder.is_prepared:
            builder.whole_units.prepare()
        attach_adapters(builder, model)
        held = model.trainable[-1:]  # by the optimizer's loop
        builder.whole_units.cut(
            builder.layers, [weight for weight in (model.embedding, model.head.weight) if weight] + held
        )
    elif builder.cuts:
        attach_adapters(builder, model)
        builder.fill_packed_shards()
    elif builder.cuts_late:
        builder.uncut.cut("load_cut")
        attach_adapters(builder, model)
        builder.uncut.cut("load_cut adapters")
    else:
        if builder.is_prepared:
            prepare_kbit(g, builder.base, casts_back=builder.behaviour.casts_embedding_back)
        attach_adapters(builder, model)
