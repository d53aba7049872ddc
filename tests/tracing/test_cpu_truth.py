"""
The recorder against torch's profiler on real runs: every allocation and free of 2 KiB or more, in order, and what the
kernels of a CPU take inside operations beside that, named.
"""

from __future__ import annotations

import gc
from collections import Counter
from difflib import SequenceMatcher
from typing import Any

import pytest
import torch

from memplan.job.spec import Job
from memplan.record.profile import Profile
from memplan.tracing.loops import full_batches
from memplan.tracing.writer import trace_job
from memplan.train.build import build_model
from memplan.train.loop import Loop
from memplan.train.optimizer import build_optimizer
from tracing.comparison import BIG_BYTES
from tracing.tiny import CONFIGS, job

LAYERS = 2
CKPT = "activation_checkpointing"

Event = tuple[int, str]
"""Bytes of an allocation (freed: below zero), and the operation around it."""

REASONS = {
    "attention forward": "tiles of scores, maxima and sums (FlashAttentionKernel.cpp, cpu_flash_attention)",
    "attention backward": "tiles of scores and of their gradient (cpu_flash_attention_backward)",
    "rng state": "checkpoints keep the state of the CPU's generator, which a GPU has not on the device",
}
"""What a CPU takes that the recorder does not see, by what takes it."""


def real_step(question: Job, config: dict[str, Any]) -> list[Event]:
    """The second step, as the profiler sees it."""
    threads, device = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(1)
    built = build_model(question, config, device, weights_path=None)
    optimizer = build_optimizer(question, built.trainable)
    loop = Loop(question, built, optimizer, full_batches(question), device)
    loop.step(1)
    gc.collect()
    gc.disable()
    try:
        profile = Profile()
        loop.step(2)
        witnessed = profile.stop().on("cpu")
    finally:
        gc.enable()
        torch.set_num_threads(threads)
    return [
        (event.num_bytes, event.operation)
        for event in witnessed.allocations
        if abs(event.num_bytes) >= BIG_BYTES
    ]


def traced_step(question: Job, config: dict[str, Any]) -> list[int]:
    """The same step by the recorder."""
    tape = trace_job(question, config, device="cpu", whole=True).flatten()
    start = next(mark.event for mark in tape.marks if mark.step == 2)
    signed = [
        tape.sizes[event] if event > 0 else -tape.sizes[-event]
        for event in tape.events[start : tape.marks[-1].event]
    ]
    return [num_bytes for num_bytes in signed if abs(num_bytes) >= BIG_BYTES]


def only_real(real: list[Event], traced: list[int]) -> list[Event]:
    """The events of the real run that the recorder has not; it must have no others."""
    matcher = SequenceMatcher(None, [num_bytes for num_bytes, _ in real], traced, autojunk=False)
    differences = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    assert all(tag == "delete" for tag, *_ in differences), [
        (real[start:stop], traced[low:high]) for _, start, stop, low, high in differences
    ]
    return [event for _, start, stop, _, _ in differences for event in real[start:stop]]


def reasons(events: list[Event]) -> dict[str, int]:
    """How many allocations there are for each of REASONS; all are freed again. Others go by their operation."""
    assert sum(num_bytes for num_bytes, _ in events) == 0
    return dict(Counter(_taker(num_bytes, operation) for num_bytes, operation in events if num_bytes > 0))


def _taker(num_bytes: int, operation: str) -> str:
    if num_bytes == torch.get_rng_state().numel():
        return "rng state"
    if "ScaledDotProductFlashAttentionForCpuBackward0" in operation:
        return "attention backward"
    return "attention forward" if "scaled_dot_product_attention" in operation else operation


ATTENTION = {"attention forward": LAYERS, "attention backward": LAYERS}
RECOMPUTED = {"attention forward": 2 * LAYERS, "attention backward": LAYERS, "rng state": 2 * LAYERS}

CASES: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("llama", {}, ATTENTION),
    ("llama", {"attention": "eager", "optimizer_kernel": "foreach"}, {}),
    ("llama", {"method": "lora", "lora__dropout": 0.1}, ATTENTION),
    (
        "llama",
        {CKPT: "full", "gradient_accumulation_steps": 2},
        {name: 2 * n for name, n in RECOMPUTED.items()},
    ),
    ("llama", {CKPT: "full", "method": "lora"}, RECOMPUTED),
    ("llama", {"packing": True}, ATTENTION),
    ("gpt2", {}, ATTENTION),
    ("gpt2", {CKPT: "full", "optimizer_kernel": "loop"}, RECOMPUTED),
]


@pytest.mark.parametrize(("model", "fields", "expected"), CASES, ids=str)
def test_the_recorder_sees_what_the_allocator_does(
    model: str, fields: dict[str, Any], expected: dict[str, int]
) -> None:
    """But for temporaries of kernels, each listed with its reason."""
    question = job(dtype="float32", max_seq_len=64, **fields)
    no_dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    layers = {"n_layer": LAYERS, **no_dropout} if model == "gpt2" else {"num_hidden_layers": LAYERS}
    config = CONFIGS[model] | layers
    real, traced = real_step(question, config), traced_step(question, config)
    assert len(traced) > 150
    assert expected == reasons(only_real(real, traced))
    assert set(expected) <= set(REASONS)
