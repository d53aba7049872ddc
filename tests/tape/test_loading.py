"""How a model comes to the device: through from_pretrained, through FSDP1, and after other work of the process."""

from __future__ import annotations

import dataclasses

import pytest

from memplan.job.load import load_job
from memplan.job.spec import Job
from memplan.model import resolve_model
from memplan.tape.behaviour import Behaviour
from memplan.tape.graph import Graph
from memplan.tape.sharded.fsdp1 import Fsdp1Units
from memplan.tape.sharded.sharding import Contents, Part, layout
from memplan.tape.sharded.wrapping import ToWrap, wrap_unit, wrap_units
from memplan.tape.writer import write_tape
from memplan.units import MiB


def job(**fields: object) -> Job:
    """QLoRA on a small model, as tutorials write it."""
    settings = {"model": "qwen2.5-0.5b", "method": "qlora", "loop": "script", "max_seq_len": 64} | fields
    return load_job(None, [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]).job


def first_events(job: Job, behaviour: Behaviour | None = None, count: int = 3) -> list[tuple[int, str]]:
    """Signed bytes and names of what a tape begins with."""
    written = write_tape(job, resolve_model("qwen2.5-0.5b"), behaviour=behaviour)
    tape = written.flatten()
    return [
        (tape.sizes[abs(event)] * (1 if event > 0 else -1), written.describe(abs(event)).where)
        for event in tape.events[:count]
    ]


def live_bytes(g: Graph) -> list[int]:
    """Bytes alive after each event."""
    live, curve = 0, []
    for event in g.events:
        live += g.sizes[event] if event > 0 else -g.sizes[-event]
        curve.append(live)
    return curve


def test_from_pretrained_makes_room_for_the_weights_first():
    """Half a byte for each of 358 million packed elements, two for each of the 136 million others; then it goes."""
    (taken, _), (given_back, _), (_, embedding) = first_events(job())

    assert 357_826_560 // 2 + 136_206_208 * 2 == taken == -given_back
    assert "model.embed_tokens.weight" == embedding


def test_stage_3_cuts_a_4_bit_model_when_all_of_it_is_loaded():
    """
    transformers makes no quantised model under zero.Init: every rank has all weights and constants, then cuts the
    weights, of which it keeps a fourth; the constants stay.
    """
    sharded = {"parallel__strategy": "ZERO_3", "parallel__dp_shard": 4}
    alone, parts = loaded(job(lora__rank=1)), loaded(job(lora__rank=1, **sharded))
    weights = 357_826_560 // 2 + 136_206_208 * 2
    constants = alone[-1] - weights
    adapters = 2 * 24 * 14 * 4864 * 4  # at most: two vectors beside each of 7 layers of a block, in float32

    assert 0 < constants < weights / 16 + adapters
    assert max(parts) >= weights + constants - adapters
    assert weights / 4 <= parts[-1] < weights / 4 + constants + adapters


def loaded(job: Job) -> list[int]:
    """Bytes alive after each event of loading, but for the room that `from_pretrained` makes first."""
    written = write_tape(job, resolve_model("qwen2.5-0.5b"))
    tape = written.flatten()
    live, curve = 0, []
    for event in tape.events[: tape.marks[1].event]:
        live += tape.sizes[abs(event)] * (1 if event > 0 else -1)
        curve.append(live)
    return curve[2:]


@pytest.mark.parametrize("fields", [{"loop": "memplan"}, {"method": "lora"}])
def test_other_loaders_take_tensor_by_tensor(fields: dict[str, str]):
    """memplan's own loop, and a 16-bit model that is loaded on the host and moved."""
    assert "model.embed_tokens.weight" == first_events(job(**fields), count=1)[0][1]


def test_work_before_loading_leaves_cublas_its_workspaces():
    """That of the thread that runs backward too, and each once."""
    lora = job(method="lora")
    behaviour = dataclasses.replace(Behaviour.for_job(lora), products_before=True)
    tape = write_tape(lora, resolve_model("qwen2.5-0.5b"), behaviour=behaviour).flatten()
    size = behaviour.cublas_workspace_bytes

    assert [size, size] == [tape.sizes[event] for event in tape.events[:2]]
    assert 2 == tape.sizes.count(size)


def test_products_with_a_bias_keep_another_workspace_where_cublaslt_has_one():
    """Qwen2's projections, at the first of them; where the process has multiplied before, from the start."""
    kept = {"torch": (2, 11)}
    full = job(loop="memplan")
    before = dataclasses.replace(Behaviour.for_job(full), products_before=True, **kept)
    tapes = [
        write_tape(full, resolve_model("qwen2.5-0.5b"), behaviour=behaviour).flatten()
        for behaviour in (
            Behaviour.for_job(full),
            dataclasses.replace(Behaviour.for_job(full), **kept),
            before,
        )
    ]

    assert [0, 1, 1] == [tape.sizes[1:].count(MiB) for tape in tapes]
    assert MiB == tapes[2].sizes[3]


def test_a_unit_passes_through_the_device_whole():
    """
    At most all of it twice, the buckets of its broadcast and the shard; the shard is left. The last tensor, which has a
    bucket to itself, is sent without a copy.
    """
    g = Graph()
    parts = [
        Part(name, (100 * MiB,), "uint8", "uint8") for name in ("block.a", "block.b", "block.c", "block.d")
    ]
    shard = wrap_unit(g, parts, 2)

    curve = live_bytes(g)
    assert (400 + 300 + 400 + 200) * MiB == max(curve)
    assert 200 * MiB == curve[-1] == g.sizes[shard.id]
    assert [300 * MiB] == [
        g.sizes[index] for index, info in enumerate(g.info) if info[2] == "bucket of a broadcast"
    ]


def test_a_unit_that_is_not_cut_stays_as_its_flat_parameter():
    """Of replicas: one copy is left."""
    g = Graph()
    kept = wrap_unit(
        g, [Part("block.a", (MiB,), "uint8", "uint8"), Part("block.b", (MiB,), "uint8", "uint8")], 1
    )

    assert 2 * MiB == live_bytes(g)[-1] == g.sizes[kept.id]


def test_a_bucket_is_there_until_the_next_unit_has_its_first_parameter():
    """NCCL's stream has read it: the next unit's first parameter cannot have its place, its second one can."""
    g = Graph()
    units = [[Part(f"{unit}.{name}", (MiB,), "uint8", "uint8") for name in "ab"] for unit in "xy"]
    wrap_units(g, [ToWrap(layer, part) for layer, unit in enumerate(units) for part in unit], [0, 1], 1)

    bucket = next(index for index, info in enumerate(g.info) if info[2] == "bucket of a broadcast")
    first, second = (
        next(index for index, info in enumerate(g.info) if info[2] == f"y.{name} before sharding")
        for name in "ab"
    )
    assert g.events.index(first) < g.events.index(-bucket) < g.events.index(second)


def test_buffers_of_a_unit_stay_whole():
    """Beside its shard."""
    g = Graph()
    weight, table = (Part(name, (MiB,), "uint8", "uint8") for name in ("weight", "table"))
    wrap_units(g, [ToWrap(None, weight), ToWrap(None, table, is_buffer=True)], [], 2)

    assert [MiB] == [g.sizes[storage.id] for storage in g.persistent]


def test_buckets_hold_one_dtype_each():
    """Two float32 tables of 1 KiB, and three bfloat16 weights of 1 KiB: a bucket of either, the tables' first."""
    g = Graph()
    tables = [Part(f"table {index}", (256,), "float32", "float32") for index in range(2)]
    weights = [Part(f"weight {index}", (512,), "bfloat16", "bfloat16") for index in range(3)]
    wrap_unit(g, weights, 2, tables)

    assert [2048, 3072] == [
        g.sizes[index] for index, info in enumerate(g.info) if info[2] == "bucket of a broadcast"
    ]


def test_units_are_wrapped_block_by_block():
    """The tensors outside the blocks come last."""
    g = Graph()
    tensors = [ToWrap(layer, Part(f"{layer}", (4,), "float32", "float32")) for layer in (None, 0, 1)]
    shards = wrap_units(g, tensors, [0, 1], 2)

    assert ["shard of 0", "shard of 1", "shard of None"] == [g.info[shard.id][2] for shard in shards]


@pytest.mark.parametrize("adapter_units", [False, True])
def test_the_next_block_is_fetched_early_unless_adapters_are_units(adapter_units: bool):
    """Then its first adapter does that, when backward comes to it (test_fsdp1.py): its own hook fetches an adapter."""
    g = Graph()
    contents = Contents([0, 1], {layer: [Part("w", (8,), "float32", "float32")] for layer in (0, 1)})
    sharded = job(method="lora", parallel__strategy="FULL_SHARD", parallel__dp_shard="2")
    units = Fsdp1Units(g, layout(sharded), contents, adapter_units=adapter_units)
    units.visit_backward(1)

    assert (set() if adapter_units else {0}) == set(units.gathered)


@pytest.mark.parametrize("layer", [None, 1])
def test_reentrant_checkpointing_fetches_nothing_ahead(layer: int | None):
    """Neither the last block, when backward begins at the loss, nor the next one."""
    g = Graph()
    contents = Contents([0, 1], {key: [Part("w", (8,), "float32", "float32")] for key in (None, 0, 1)})
    sharded = job(method="lora", parallel__strategy="FULL_SHARD", parallel__dp_shard="2")
    fetched = []
    for recomputes in (False, True):
        units = Fsdp1Units(g, layout(sharded), contents, recomputes_units=recomputes)
        units.visit_backward(layer)
        fetched.append(set(units.gathered))

    assert [{1 if layer is None else 0}, set()] == fetched
