"""
The planner's tape for the CPU is what torch's CPU allocator does when the trainer runs the job.

Truth is the profiler's record of every allocation and free in the second optimizer step of `memplan.train`'s own loop
on tiny models. Temporaries that one kernel takes and gives back at once are left out on both sides.
"""

from __future__ import annotations

import pytest

from memplan.job.spec import Job, Lora, Npt, Train

pytest.importorskip("transformers")
pytest.importorskip("peft")

from cpu_truth import peak, planned_step, profiled_step

pytestmark = pytest.mark.torch

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000, "hidden_size": 64,
    "intermediate_size": 176, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 1000, "n_embd": 64, "n_head": 4,
    "n_layer": 5, "n_positions": 128,
}  # fmt: skip
CONFIGS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "gpt2": GPT2}


def make_job(**fields) -> Job:
    """A job on random float32 weights."""
    base = {
        "model": "tiny",
        "weights": "random",
        "dtype": "float32",
        "micro_batch_size": 2,
        "max_seq_len": 64,
    }
    return Job(**{**base, "lora": Lora(rank=8), "npt": Npt(rank=8), **fields})


def without_temporaries(signed: list[int]) -> list[int]:
    """Drop what is allocated and freed by the very next event, again and again."""
    kept: list[int] = []
    for size in signed:
        if kept and kept[-1] == -size > 0:
            kept.pop()
        else:
            kept.append(size)
    return kept


EXACT = [
    (family, {"method": method, "attention": "sdpa"})
    for family in ("llama", "qwen2", "qwen3")
    for method in ("full", "lora")
] + [
    ("llama", {"method": "full", "attention": "sdpa", "optimizer_kernel": "foreach", "loss": "chunked"}),
    ("llama", {"method": "lora", "attention": "sdpa", "lora": Lora(rank=8, dropout=0.1)}),
    ("llama", {"method": "full", "attention": "sdpa", "optimizer": "sgd"}),
    (
        "llama",
        {
            "method": "full",
            "attention": "sdpa",
            "optimizer_kernel": "loop",
            "gradient_accumulation_steps": 2,
        },
    ),
]


@pytest.mark.parametrize(("family", "fields"), EXACT, ids=str)
def test_the_tape_is_the_allocators_own_record(family, fields):
    """Every allocation and free of 2 KiB or more, in order."""
    job = make_job(**fields)

    measured = without_temporaries(profiled_step(job, CONFIGS[family]))
    planned = without_temporaries(planned_step(job, CONFIGS[family]))

    assert len(measured) > 300
    assert measured == planned


GRID = [
    (family, {"method": method, "attention": attention, "activation_checkpointing": checkpointing})
    for family in CONFIGS
    for method in ("full", "lora", "npt")
    for attention in ("eager", "sdpa")
    for checkpointing in ("none", "selective", "full")
    if method != "npt" or checkpointing == "none"
] + [
    ("llama", {"method": "npt", "npt": Npt(rank=8, form="materialised")}),
    ("llama", {"method": "lora", "attention": "eager", "micro_batch_size": 1, "max_seq_len": 128}),
    ("gpt2", {"method": "lora", "attention": "eager", "micro_batch_size": 1, "max_seq_len": 128}),
    ("gpt2", {"method": "lora", "attention": "sdpa", "micro_batch_size": 1, "max_seq_len": 128}),
    ("llama", {"method": "full", "dtype": "bfloat16"}),
    ("llama", {"method": "lora", "dtype": "bfloat16"}),
    ("llama", {"method": "full", "autocast": "bfloat16"}),
    ("llama", {"method": "full", "optimizer": "adafactor", "optimizer_kernel": "loop"}),
    ("gpt2", {"method": "full", "train": Train(max_grad_norm=1.0), "gradient_accumulation_steps": 2}),
    ("gpt2", {"method": "npt", "dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("family", "fields"), GRID, ids=str)
def test_the_peak_is_within_one_percent(family, fields):
    """Planned against measured peak of a step, for models so small that every kernel's scratch counts."""
    job = make_job(**fields)

    measured, planned = peak(profiled_step(job, CONFIGS[family])), peak(planned_step(job, CONFIGS[family]))

    assert measured == pytest.approx(planned, rel=0.01)
