"""
FSDP1 on units worked out by hand: which stream takes what, what is gathered when, and what a rank has of a tensor.

Sources are torch/distributed/fsdp/_runtime_utils.py and _flat_param.py.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from memplan.allocator import replay
from memplan.job.load import load_job
from memplan.job.spec import Job
from memplan.model import resolve_model
from memplan.tape.behaviour import Behaviour
from memplan.tape.engine import backward_from
from memplan.tape.graph import Graph
from memplan.tape.linear import matmul
from memplan.tape.sharded.fsdp1 import Fsdp1Units, cut_flat
from memplan.tape.sharded.sharding import (
    GATHER_STREAM,
    PRE_GATHER_STREAM,
    REDUCE_STREAM,
    Contents,
    Part,
    layout,
)
from memplan.tape.sharded.wrapping import ToWrap, upcast_shards, wrap_units
from memplan.tape.tensors import Parameter, Storage
from memplan.tape.writer import write_tape

UNIT_STEPS = ("all-gather output", "flat gradient", "gradients of a unit")
SHARDED = {"parallel.strategy": "FULL_SHARD", "parallel.dp_shard": "2"}


def make_job(**fields: object) -> Job:
    settings = {"model": "qwen2.5-0.5b", "method": "full", "max_seq_len": 64, **SHARDED} | fields
    return load_job(None, [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]).job


def parameter(name: str, numel: int, layer: int | None = 0) -> Parameter:
    """Of float32, computed with in bfloat16."""
    made = Parameter(name, (numel,), "bfloat16", Storage([], 0), layer, trainable=True)
    made.stored_dtype = "float32"
    return made


def units_of(g: Graph, parameters: dict[int | None, list[Parameter]], **options: bool) -> Fsdp1Units:
    contents = Contents([layer for layer in parameters if layer is not None])
    for layer, members in parameters.items():
        contents.trainable[layer] = members
        contents.parts[layer] = [
            Part(item.name, item.shape, item.stored_dtype, item.dtype) for item in members
        ]
    return Fsdp1Units(g, layout(make_job()), contents, **options)


def written(g: Graph) -> list[tuple[int, str, int]]:
    """(signed bytes, name, stream) of every event with bytes."""
    return [
        (g.sizes[abs(event)] * (1 if event > 0 else -1), g.info[abs(event)][2], g.streams.get(abs(event), 0))
        for event in g.events
        if g.sizes[abs(event)]
    ]


def test_a_cast_shard_goes_when_it_has_been_gathered():
    """100 elements over 2 ranks: 50 of 2 bytes on a stream before the one that takes all 100."""
    g = Graph()
    units = units_of(g, {0: [parameter("w", 100)]})
    units.before_forward(0, None)
    units.after_forward(0)

    assert [
        (100, "cast of the shard", PRE_GATHER_STREAM),
        (200, "all-gather output", GATHER_STREAM),
        (-100, "cast of the shard", PRE_GATHER_STREAM),
        (-200, "all-gather output", GATHER_STREAM),
    ] == written(g)
    assert {1, 3} == g.recorded
    assert {2: GATHER_STREAM} == g.waits


def test_gradients_are_joined_where_they_were_computed_and_reduced_elsewhere():
    """
    60 and 40 elements: 200 bytes joined beside both gradients; the parameters go; a shard of 50 elements in bfloat16
    and then in float32, which both parameters share; the joined one goes last.
    """
    g = Graph()
    members = [parameter("a", 60), parameter("b", 40)]
    units = units_of(g, {0: members})
    units.visit_backward(0)
    for member in members:
        member.grad = g.new(member.shape, member.dtype, f"{member.name} grad")
    start = len(written(g))
    units.leave_backward(0)

    assert [
        (200, "flat gradient", 0),
        (-120, "a grad", 0),
        (-80, "b grad", 0),
        (-200, "all-gather output", GATHER_STREAM),
        (100, "gradients of a unit", REDUCE_STREAM),
        (200, "gradients of a unit", REDUCE_STREAM),
        (-100, "gradients of a unit", REDUCE_STREAM),
        (-200, "flat gradient", 0),
    ] == written(g)[start:]
    kept = [member.sharded_grad for member in members]
    assert kept[0] is not None and kept[1] is not None and kept[0].storage is kept[1].storage


def test_a_checkpoint_around_a_unit_gathers_it_twice_and_nothing_ahead():
    """Its forward inside backward gives it back; without, the unit stays and the block before is on its way."""
    gathered = {}
    for recomputes in (True, False):
        g = Graph()
        units = units_of(g, {0: [parameter("a", 8)], 1: [parameter("b", 8)]}, recomputes_units=recomputes)
        units.visit_backward(1)
        if recomputes:
            units.after_recomputation(1)
        gathered[recomputes] = [size for size, name, _ in written(g) if name == "all-gather output"]
        assert ({0} if not recomputes else set()) == set(units.gathered)

    assert {True: [16, -16, 16], False: [16, 16]} == gathered


@pytest.mark.parametrize(
    ("rank", "parts"),
    [(0, [10, 20, 0]), (1, [0, 30, 0]), (2, [0, 0, 30]), (3, [0, 0, 28])],
)
def test_a_shard_ends_inside_tensors(rank: int, parts: list[int]):
    """10, 50 and 58 elements in a row, cut into 30, 30, 30 and 28."""
    members = [parameter("a", 10), parameter("b", 50), parameter("c", 58)]
    cut_flat(Contents([0], trainable={0: members}), rank, 4, each=False)

    assert parts == [prod(member.local_shape) for member in members]


def test_adapters_are_cut_one_by_one():
    """Each of them is a unit: half of either is on either rank."""
    members = [parameter("a", 10), parameter("b", 50)]
    cut_flat(Contents([0], trainable={0: members}), 1, 2, each=True)

    assert [(5,), (25,)] == [member.local_shape for member in members]


def units_made_float32(g: Graph, strategy: str) -> Fsdp1Units:
    """100 elements in a block and 100 outside, over 2 ranks, made float32 once they are wrapped."""
    members: dict[int | None, list[Parameter]] = {0: [parameter("a", 100)], None: [parameter("b", 100, None)]}
    tensors = [
        ToWrap(layer, Part(item.name, item.shape, "bfloat16", "bfloat16"), item)
        for layer, items in members.items()
        for item in items
    ]
    shards = wrap_units(g, tensors, [0], 2)
    start = len(written(g))
    wrapped = upcast_shards(g, tensors, [0], 2, shards)
    assert [(200, "float32 shard", 0)] * 2 == written(g)[start:]
    units = units_of(g, members)
    units.layout = layout(make_job(parallel__strategy=strategy))
    units.wrapped = wrapped
    return units


def bf16_shards_freed(g: Graph, start: int) -> list[tuple[int, str]]:
    return [entry[:2] for entry in written(g)[start:] if entry[0] < 0 and entry[1].startswith("shard")]


def test_shards_become_float32_after_wrapping_and_go_with_the_first_forward():
    """
    Of 100 bytes each, the root's first. After forward a unit's parameters are views of the float32 shard: the root's
    too, though it stays gathered.
    """
    g = Graph()
    units = units_made_float32(g, "FULL_SHARD")
    units.before_forward(None, None)
    units.before_forward(0, None)
    start = len(written(g))
    units.after_forward(0)
    assert [(-100, "shard of a")] == bf16_shards_freed(g, start)
    units.after_forward(None)
    assert [(-100, "shard of a"), (-100, "shard of b")] == bf16_shards_freed(g, start)
    assert list(units.unsharded) == [None]


def test_units_that_stay_gathered_keep_16_bit_shards_until_the_first_backward():
    """That of a micro batch which reduces nothing is enough, though it lets go of no unit."""
    g = Graph()
    units = units_made_float32(g, "SHARD_GRAD_OP")
    units.is_last = False
    start = len(written(g))
    for layer in (None, 0):
        units.before_forward(layer, None)
    for layer in (0, None):
        units.after_forward(layer)
    assert bf16_shards_freed(g, start) == []
    units.leave_backward(0)
    units.end_backward()
    assert [(-100, "shard of a"), (-100, "shard of b")] == bf16_shards_freed(g, start)
    assert list(units.unsharded) == [None, 0]


@pytest.mark.parametrize(
    ("device", "dtype", "copies"), [("cpu", "bfloat16", 1), ("cuda", "bfloat16", 0), ("cpu", "float32", 0)]
)
def test_norms_of_16_bit_gradients_are_taken_of_copies_on_the_cpu(device: str, dtype: str, copies: int):
    """One at a time, of what the rank has of each tensor."""
    job = make_job(loop="hf_trainer", parallel__fsdp_version=1, dtype=dtype, autocast=None)
    written = write_tape(job, resolve_model(job.model), device=device, num_steps=1)
    storages = [written.describe(storage) for storage in range(1, len(written.flatten().sizes))]
    widened = sum(item.num_bytes for item in storages if item.where.endswith("grad in float32"))
    reduced = sum(item.num_bytes for item in storages if item.where.endswith("gradients of a unit"))
    assert widened == copies * 2 * reduced
    assert reduced > 0


@pytest.mark.parametrize("attention", ["flash_attention_2", "sdpa"])
def test_a_trainer_of_4_45_waits_in_every_flash_attention(attention: str):
    """One wait per block forward, one recomputed; beside those before each of 3 gathers per block, and of the root."""
    job = make_job(
        loop="hf_trainer", attention=attention, autocast="bfloat16", dtype="float32",
        activation_checkpointing="full", gpu="A100-80G",
    )  # fmt: skip
    behaviour = Behaviour.for_software(job, {"transformers": "4.45.2", "torch": "2.4.1"}, family="qwen2")
    architecture = resolve_model("qwen2.5-0.5b")
    tape = write_tape(job, architecture, behaviour=behaviour, num_steps=1).flatten()
    blocks = architecture.num_hidden_layers

    assert 3 * blocks + 1 == list(tape.waits.values()).count(GATHER_STREAM)
    in_attention = 2 * blocks if attention == "flash_attention_2" else 0
    assert in_attention + 1 == list(tape.waits.values()).count(0)  # and when backward is over


def test_a_host_ahead_holds_one_unit_more_and_never_less():
    """Reserved: at least a second gathered block beside the one in use. Allocated: the same."""
    job = make_job(
        loop="hf_trainer", method="lora", attention="flash_attention_2", activation_checkpointing="full"
    )
    behaviour = Behaviour.for_software(job, {"transformers": "4.45.2", "torch": "2.4.1"}, family="qwen2")
    tape = write_tape(job, resolve_model("qwen2.5-0.5b"), behaviour=behaviour).flatten()
    in_order = replay(tape.events, tape.sizes, tape.streams, job.allocator)
    ahead = replay(
        tape.events, tape.sizes, tape.streams, job.allocator, recorded=tape.recorded, waits=tape.waits
    )
    block = max(tape.sizes[i] for i, stream in tape.streams.items() if stream == GATHER_STREAM and i > 1)

    assert in_order.peak_allocated_bytes == ahead.peak_allocated_bytes
    assert in_order.peak_reserved_bytes < ahead.peak_reserved_bytes <= in_order.peak_reserved_bytes + block


def test_replicas_join_gradients_of_matrices_on_the_stream_that_cut_them():
    """One after the other, each in a tensor of its own that stays; the host waits when backward is over."""
    job = make_job(
        method="lora", parallel__strategy="NO_SHARD", parallel__dp_shard="1", parallel__dp_replicate="2"
    )
    behaviour = replace(Behaviour.for_job(job), fsdp1=True)
    tape = write_tape(job, resolve_model(job.model), behaviour=behaviour, num_steps=1).flatten()
    of_matrices = {storage for storage in tape.recorded if tape.sizes[storage]}
    kept = [storage for storage in tape.streams if tape.streams[storage] == GATHER_STREAM]

    assert sorted(tape.sizes[storage] for storage in of_matrices) == sorted(
        tape.sizes[storage] for storage in kept
    )
    assert not of_matrices & set(kept)
    first, wait = tape.events.index(kept[0]), tape.events.index(next(iter(tape.waits)))
    assert all(tape.events.index(-storage) < wait for storage in of_matrices)
    assert all(first <= tape.events.index(storage) < wait < tape.events.index(-storage) for storage in kept)


def test_matrices_of_adapters_are_units_of_their_own():
    """
    Gathered for their product and let go after it. In backward the one that ran last is there first, the one before it
    is fetched ahead, and the block before by the first; each is reduced, in halves, when it has its gradient.
    """
    g = Graph()
    first, second = (
        Parameter(f"q.lora_{name}.weight", (8, 8), "bfloat16", Storage([], 0), 1, trainable=True)
        for name in "AB"
    )
    units = units_of(g, {0: [], 1: [first, second]}, adapter_units=True)
    units.contents.parts[0] = [Part("below", (64,), "bfloat16", "bfloat16")]
    units.contents.parts[1].append(Part("base", (128,), "bfloat16", "bfloat16"))
    g.units = units
    g.enter(1)
    units.before_forward(1, None)
    x = g.new((4, 8), "bfloat16", "input")
    out = units.around_matrix(first, lambda: matmul(g, x, first, None, 8))
    out = units.around_matrix(second, lambda: matmul(g, out, second, None, 8))
    units.after_forward(1)
    gathers = [(size, g_stream) for size, name, g_stream in written(g) if name == "all-gather output"]
    assert [(256, 1), (128, 1), (-128, 1), (128, 1), (-128, 1), (-256, 1)] == gathers

    start = len(written(g))
    units.visit_backward(1)
    backward_from(g, out, g.new((4, 8), "bfloat16", "grad"))
    steps = [(size, name) for size, name, _ in written(g)[start:] if name in UNIT_STEPS]
    assert [
        (256, "all-gather output"),  # the block
        (128, "all-gather output"),  # B, and A ahead of it
        (128, "all-gather output"),
        (128, "flat gradient"),
        (-128, "all-gather output"),  # after AccumulateGrad, which has the flat gradient
        (64, "gradients of a unit"),
        (-128, "flat gradient"),
        (128, "all-gather output"),  # the block before
        (128, "flat gradient"),
        (-128, "all-gather output"),
        (64, "gradients of a unit"),
        (-128, "flat gradient"),
    ] == steps
    assert {0} == set(units.gathered)
