"""Rank 0 of many: what DDP and FSDP2 allocate, traced over a group that sends nothing, beside the shape writer."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.job.spec import Job
from memplan.tracing.writer import trace_job
from tracing.comparison import compare
from tracing.test_repetition import in_blocks
from tracing.test_shape_equals_trace import assert_equal
from tracing.tiny import CONFIGS, job

CKPT, ACCUMULATION = "activation_checkpointing", "gradient_accumulation_steps"
MIXED = {"dtype": "float32", "autocast": "bfloat16"}
DDP = {"parallel__dp_replicate": 2}
FULL_SHARD = {"parallel__strategy": "FULL_SHARD", "parallel__dp_shard": 8}
SHARD_GRAD_OP = {"parallel__strategy": "SHARD_GRAD_OP", "parallel__dp_shard": 3}
HYBRID_SHARD = {"parallel__strategy": "HYBRID_SHARD", "parallel__dp_shard": 4, "parallel__dp_replicate": 2}
STRATEGIES = (DDP, FULL_SHARD, SHARD_GRAD_OP, HYBRID_SHARD)
NPT = {"method": "npt", "npt__rank": 4}
LORA = {"method": "lora"}
QLORA = {"method": "qlora"}
WIDE = CONFIGS["llama"] | {"hidden_size": 256, "intermediate_size": 704, "num_key_value_heads": 4}

JOBS: list[tuple[str, dict[str, Any]]] = [
    ("wide", DDP | MIXED),
    ("wide", DDP | LORA | {ACCUMULATION: 2, CKPT: "full"}),
    ("gpt2", DDP | {"train__max_grad_norm": 1.0}),
    ("qwen2", DDP | NPT),
    ("wide", FULL_SHARD | MIXED | {CKPT: "full"}),
    ("gpt2", FULL_SHARD | {ACCUMULATION: 2}),
    ("llama", FULL_SHARD | LORA | {CKPT: "selective"}),
    ("llama", FULL_SHARD | NPT),
    ("wide", FULL_SHARD | MIXED | {"offload__params": True, "parallel__dp_shard": 4}),
    ("llama", {"offload__params": True, "optimizer_kernel": "loop"}),
    ("qwen3", SHARD_GRAD_OP | {"optimizer_kernel": "foreach"}),
    ("qwen2, tied", SHARD_GRAD_OP | MIXED | {CKPT: "full"}),
    ("mistral", SHARD_GRAD_OP | LORA | {"lora__target_modules": "[q_proj,v_proj]"}),
    ("gpt2", SHARD_GRAD_OP | NPT),
    ("wide", HYBRID_SHARD),
    ("qwen2, tied", HYBRID_SHARD | MIXED | {ACCUMULATION: 4}),
    ("llama", HYBRID_SHARD | LORA | {CKPT: "full", ACCUMULATION: 2}),
    ("qwen3", HYBRID_SHARD | NPT),
    ("llama", FULL_SHARD | NPT | {"offload__params": True, "train__max_grad_norm": 1.0}),
    ("wide", DDP | QLORA | {CKPT: "full"}),
    ("wide", FULL_SHARD | QLORA | {CKPT: "full"}),
    ("qwen2", FULL_SHARD | QLORA | MIXED | {"quantization__double_quant": False, ACCUMULATION: 2}),
    ("llama", FULL_SHARD | QLORA | {"offload__params": True, "quantization__skip": "[]"}),
    ("llama", FULL_SHARD | QLORA | {"quantization__kbit_preparation": True, "lora__dtype": "bfloat16"}),
    ("wide", SHARD_GRAD_OP | QLORA),
    ("llama", HYBRID_SHARD | QLORA | {CKPT: "selective", "data__special_tokens": "[<a>,<b>,<c>]"}),
    ("gpt2", FULL_SHARD | QLORA | {"offload__params": True}),
    ("falcon, grouped", FULL_SHARD | QLORA | MIXED | {CKPT: "full"}),
    ("bert", FULL_SHARD | MIXED),
    ("bert", SHARD_GRAD_OP | LORA | MIXED | {CKPT: "full"}),
    ("llama", FULL_SHARD | NPT | {"npt__quantized_base": True}),
    ("llama", SHARD_GRAD_OP | LORA | {"data__special_tokens": "[<a>,<b>,<c>]"}),
]


def config_of(name: str) -> dict[str, Any]:
    return WIDE if name == "wide" else CONFIGS[name]


@pytest.mark.parametrize(("model", "fields"), JOBS, ids=str)
def test_every_event_is_that_of_the_trace(model: str, fields: dict[str, Any]) -> None:
    """Each strategy with each method, checkpointed or not."""
    assert_equal(compare(job(**fields), config_of(model)))
    assert not dist.is_initialized()


@st.composite
def jobs(draw: st.DrawFn) -> tuple[str, Job]:
    """A tiny model and a job of it on several ranks."""
    method = draw(st.sampled_from([{}, MIXED, LORA, QLORA, LORA | {"dtype": "float32"}, NPT]))
    fields = draw(st.sampled_from(STRATEGIES)) | method
    if method is not NPT:
        fields |= {CKPT: draw(st.sampled_from(["none", "full", "selective"]))}
    if draw(st.booleans()):
        fields |= {"train__max_grad_norm": 1.0}
    if fields.get("parallel__strategy") and method is not NPT:
        fields |= {
            "parallel__dp_shard": draw(st.sampled_from([2, 3])),
            "offload__params": draw(st.booleans()),
        }
    fields |= {
        ACCUMULATION: draw(st.sampled_from([1, 2, 3])),
        "train__weight_decay": draw(st.sampled_from([0.0, 0.1])),
    }
    return draw(
        st.sampled_from(["llama", "qwen2, tied", "gpt2", "falcon"][: 3 if method is NPT else 4])
    ), job(**fields)


@settings(max_examples=int(os.environ.get("MEMPLAN_EXAMPLES", "3")), derandomize=True)
@given(jobs())
def test_any_job_is_planned_as_it_is_traced(drawn: tuple[str, Job]) -> None:
    model, drawn_job = drawn
    both = compare(drawn_job, CONFIGS[model])
    assert both.lifetimes(both.shape) == both.lifetimes(both.trace), both.first_difference()
    shape, trace = both.peaks()
    assert abs(shape / trace - 1) < 0.005  # scalars of the norm of cut gradients


@pytest.mark.parametrize("fields", [FULL_SHARD | LORA | {CKPT: "full"}, HYBRID_SHARD], ids=str)
def test_repeating_blocks_is_tracing_them_all(fields: dict[str, Any]) -> None:
    config = WIDE | {"num_hidden_layers": 10}
    few, every = (trace_job(job(**fields), config, whole=whole) for whole in (False, True))
    assert in_blocks(few.flatten()) == in_blocks(every.flatten())
    assert len(few.expansion.layers) < 10


def test_collectives_have_streams_of_their_own() -> None:
    traced = trace_job(job(**FULL_SHARD, **MIXED), WIDE)
    tape = traced.flatten()
    assert len(set(tape.streams.values())) == 2  # copies into the gather, and the reduction
    assert {traced.describe(storage_id).category for storage_id in tape.streams} == {"comm", "gradients"}


def test_memory_falls_with_the_number_of_ranks() -> None:
    at_rest = []
    for ranks in (2, 16):
        fields = FULL_SHARD | MIXED | {"parallel__dp_shard": ranks}
        traced = trace_job(job(**fields), WIDE)
        tape = traced.flatten()
        loaded = tape.events[: tape.marks[1].event]
        at_rest.append(sum(tape.sizes[event] for event in loaded if event > 0))
    assert 7.5 < at_rest[0] / at_rest[1] < 8.1


def test_offloaded_shards_are_not_on_the_tape() -> None:
    kept, offloaded = (
        trace_job(replace(task, offload=replace(task.offload, params=flag)), WIDE).flatten()
        for task in (job(**FULL_SHARD, **MIXED),)
        for flag in (False, True)
    )
    assert sum(offloaded.sizes[: offloaded.marks[1].event]) < 0.05 * sum(kept.sizes[: kept.marks[1].event])
