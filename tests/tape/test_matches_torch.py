"""
The planner's tape for the CPU is what torch's CPU allocator does when the trainer runs the job.

Truth is the profiler's record of every allocation and free in the second optimizer step of `memplan.train`'s own loop
on tiny models. Temporaries that one kernel takes and gives back at once are left out on both sides.
"""

from __future__ import annotations

import pytest

from memplan.job.spec import Job, Lora, Npt, Quantization, Train

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
MIXTRAL = {
    **LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
    "num_experts_per_tok": 2, "intermediate_size": 80, "num_hidden_layers": 3,
}  # fmt: skip
QWEN3_MOE = {
    **LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 6,
    "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True, "num_hidden_layers": 3,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 1000, "n_embd": 64, "n_head": 4,
    "n_layer": 5, "n_positions": 128,
}  # fmt: skip
GPT_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 1000, "hidden_size": 64,
    "intermediate_size": 176, "num_hidden_layers": 5, "num_attention_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
GPT_BIGCODE = {
    "architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "vocab_size": 1000, "n_embd": 64,
    "n_head": 4, "n_layer": 7, "n_positions": 128, "attn_pdrop": 0.0,
}  # fmt: skip
FALCON = {
    "architectures": ["FalconForCausalLM"], "model_type": "falcon", "vocab_size": 1000, "hidden_size": 64,
    "num_hidden_layers": 5, "num_attention_heads": 4,
}  # fmt: skip
GEMMA = {
    **LLAMA, "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
GEMMA2 = {**GEMMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_key_value_heads": 2}
GEMMA3 = {
    **GEMMA2, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 32,
    "sliding_window_pattern": 3,
}  # fmt: skip
PHI3 = {
    **LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
OLMO = {**LLAMA, "architectures": ["OlmoForCausalLM"], "model_type": "olmo", "clip_qkv": 8.0}
OLMO2 = {**LLAMA, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
OLMO3 = {**LLAMA, "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": 32}
CONFIGS = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gpt2": GPT2,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "gpt_neox": GPT_NEOX,
    "gpt_bigcode": GPT_BIGCODE,
    "falcon": FALCON,
    "falcon, grouped": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_bigcode, all key heads, dropout": {**GPT_BIGCODE, "multi_query": False, "attn_pdrop": 0.1},
}


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
    for family in ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt_neox", "gpt_bigcode")
    for method in ("full", "lora")
] + [
    ("falcon", {"method": "lora", "attention": "eager"}),
    ("falcon, grouped", {"method": "lora", "attention": "eager"}),
    ("llama", {"method": "full", "attention": "sdpa", "optimizer_kernel": "foreach", "loss": "chunked"}),
    ("llama", {"method": "lora", "attention": "sdpa", "lora": Lora(rank=8, dropout=0.1)}),
    ("llama", {"method": "full", "attention": "sdpa", "optimizer": "sgd"}),
    ("llama", {"method": "qlora", "attention": "sdpa", "lora": Lora(rank=8, dropout=0.1)}),
    ("qwen2", {"method": "qlora", "attention": "sdpa", "dtype": "bfloat16"}),
    ("llama", {"method": "qlora", "dtype": "bfloat16", "autocast": "bfloat16"}),
    ("llama", {"method": "qlora", "attention": "sdpa", "quantization": Quantization(type="int8")}),
    ("llama", {"method": "qlora", "autocast": "bfloat16", "quantization": Quantization(type="int8")}),
    ("qwen2", {"method": "qlora", "dtype": "bfloat16", "quantization": Quantization(type="int8")}),
    ("llama", {"method": "full", "optimizer_kernel": "foreach", "train": Train(weight_decay=0.1)}),
    ("llama", {"method": "full", "optimizer_kernel": "loop", "train": Train(weight_decay=0.1)}),
    ("llama", {"method": "full", "packing": True}),
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
EXACT += [
    (family, {"method": method, "attention": "eager" if family == "gemma2" else "sdpa"})
    for family in ("gemma", "gemma2", "gemma3", "phi3", "olmo", "olmo2", "olmo3")
    for method in ("full", "lora")
]
EXACT += [
    ("gemma2", {"method": "full", "attention": "eager", "loss": "chunked"}),
    ("gemma3", {"method": "full", "packing": True}),
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
    for family in ("llama", "qwen2", "qwen3", "gpt2")
    for method in ("full", "lora", "npt")
    for attention in ("eager", "sdpa")
    for checkpointing in ("none", "selective", "full")
    if method != "npt" or checkpointing == "none"
] + [
    ("llama", {"method": "npt", "npt": Npt(rank=8, form="materialised")}),
    ("llama", {"method": "npt", "npt": Npt(rank=16, variant="outer", components=16)}),
    ("llama", {"method": "npt", "npt": Npt(rank=8, variant="outer", components=4, form="materialised")}),
    ("llama", {"method": "npt", "npt": Npt(rank=64, target="gate_up", bias=True)}),
    ("llama", {"method": "npt", "npt": Npt(rank=8, quantized_base=True)}),
    ("llama", {"method": "npt", "npt": Npt(rank=8, stream="student", target="gate_up")}),
    ("llama", {"method": "npt", "npt": Npt(rank=8, objective="end_to_end", variant="outer", components=4)}),
    (
        "llama",
        {"method": "npt", "npt": Npt(rank=8, objective="end_to_end", form="materialised", layers="all")},
    ),
    ("gpt2", {"method": "npt", "npt": Npt(rank=8, objective="end_to_end")}),
    ("gpt2", {"method": "npt", "npt": Npt(rank=8, objective="end_to_end", logits_weight=0.5, layers=(2,))}),
    (
        "qwen2",
        {
            "method": "npt",
            "dtype": "bfloat16",
            "micro_batch_size": 5,
            "npt": Npt(rank=8, objective="end_to_end", logits_weight=1.0, layers=(2,)),
        },
    ),
    ("llama", {"method": "npt", "npt": Npt(rank=8, stream="curriculum")}),
    ("llama", {"method": "npt", "npt": Npt(rank=64, variant="linear", target="all", bias=True)}),
    ("llama", {"method": "npt", "npt": Npt(rank=8, variant="linear", target="all", form="materialised")}),
    ("gpt2", {"method": "npt", "dtype": "bfloat16", "npt": Npt(rank=64, variant="linear", target="all")}),
    (
        "qwen2",
        {
            "method": "npt",
            "npt": Npt(rank=8, variant="linear", target="all", objective="end_to_end", bias=True),
        },
    ),
    (
        "qwen2",
        {"method": "npt", "dtype": "bfloat16", "npt": Npt(rank=8, target="gate_up", quantized_base=True)},
    ),
    ("gpt2", {"method": "npt", "npt": Npt(rank=8, variant="outer", components=4, bias=True)}),
    ("llama", {"method": "lora", "attention": "eager", "micro_batch_size": 1, "max_seq_len": 128}),
    ("gpt2", {"method": "lora", "attention": "eager", "micro_batch_size": 1, "max_seq_len": 128}),
    ("gpt2", {"method": "lora", "attention": "sdpa", "micro_batch_size": 1, "max_seq_len": 128}),
    ("llama", {"method": "full", "dtype": "bfloat16"}),
    ("llama", {"method": "lora", "dtype": "bfloat16"}),
    ("llama", {"method": "full", "autocast": "bfloat16"}),
    ("llama", {"method": "full", "optimizer": "adafactor", "optimizer_kernel": "loop"}),
    ("gpt2", {"method": "full", "train": Train(max_grad_norm=1.0), "gradient_accumulation_steps": 2}),
    ("gpt2", {"method": "npt", "dtype": "bfloat16"}),
    ("llama", {"method": "qlora", "autocast": "bfloat16"}),
    ("qwen3", {"method": "qlora", "activation_checkpointing": "full"}),
    ("llama", {"method": "qlora", "dtype": "bfloat16", "quantization": Quantization(kbit_preparation=True)}),
    ("llama", {"method": "qlora", "quantization": Quantization(type="fp4", skip=())}),
    (
        "qwen3",
        {"method": "qlora", "quantization": Quantization(type="int8"), "activation_checkpointing": "full"},
    ),
    ("gemma2", {"method": "lora", "attention": "eager", "activation_checkpointing": "full"}),
    ("gemma2", {"method": "full", "attention": "eager", "autocast": "bfloat16"}),
    ("gemma3", {"method": "lora", "attention": "eager", "dtype": "bfloat16"}),
    ("gemma3", {"method": "full", "activation_checkpointing": "full"}),
    ("phi3", {"method": "lora", "activation_checkpointing": "full", "lora": Lora(rank=8, dropout=0.1)}),
    ("olmo2", {"method": "full", "dtype": "bfloat16", "activation_checkpointing": "full"}),
    ("mixtral", {"method": "full", "attention": "eager", "activation_checkpointing": "full"}),
    ("mixtral", {"method": "lora", "attention": "sdpa", "activation_checkpointing": "full"}),
    ("mixtral", {"method": "lora", "lora": Lora(rank=8, target_modules=("q_proj", "v_proj"), dropout=0.1)}),
    ("mixtral", {"method": "full", "autocast": "bfloat16"}),
    ("qwen3_moe", {"method": "full", "attention": "sdpa", "activation_checkpointing": "selective"}),
    ("qwen3_moe", {"method": "lora", "attention": "eager"}),
    ("qwen3_moe", {"method": "lora", "dtype": "bfloat16"}),
    ("llama", {"method": "lora", "activation_checkpointing": "full", "activation_offload": True}),
    ("gpt2", {"method": "full", "activation_checkpointing": "selective", "activation_offload": True}),
    ("gpt_neox", {"method": "lora", "attention": "eager", "dtype": "bfloat16"}),
    ("gpt_neox", {"method": "full", "attention": "sdpa", "activation_checkpointing": "full"}),
    ("gpt_neox", {"method": "full", "autocast": "bfloat16"}),
    ("falcon", {"method": "full", "attention": "eager", "activation_checkpointing": "full"}),
    ("falcon", {"method": "lora", "attention": "sdpa", "dtype": "bfloat16"}),
    ("falcon", {"method": "full", "autocast": "bfloat16"}),
    ("falcon, grouped", {"method": "full", "attention": "sdpa"}),
    ("falcon, grouped", {"method": "lora", "attention": "sdpa", "activation_checkpointing": "full"}),
    ("gpt_bigcode", {"method": "full", "attention": "eager", "activation_checkpointing": "selective"}),
    ("gpt_bigcode", {"method": "lora", "activation_checkpointing": "full"}),
    ("gpt_bigcode, all key heads, dropout", {"method": "lora", "attention": "sdpa"}),
    ("gpt_bigcode, all key heads, dropout", {"method": "full", "attention": "sdpa", "dtype": "bfloat16"}),
]


PACKED = [
    (family, {"method": method, "attention": attention, "packing": True, "max_seq_len": 128, **fields})
    for family in ("llama", "gpt2")
    for method, attention, fields in (
        ("full", "eager", {}),
        ("full", "sdpa", {"activation_checkpointing": "full"}),
        ("lora", "sdpa", {}),
        ("npt", "sdpa", {}),
    )
]


@pytest.mark.parametrize(("family", "fields"), GRID + PACKED, ids=str)
def test_the_peak_is_within_one_percent(family, fields):
    """Planned against measured peak of a step, for models so small that every kernel's scratch counts."""
    job = make_job(**fields)

    measured, planned = peak(profiled_step(job, CONFIGS[family])), peak(planned_step(job, CONFIGS[family]))

    assert measured == pytest.approx(planned, rel=0.01)


def test_torch_skips_slices_of_whole_dimensions_from_the_version_that_plans_take():
    """The graph of `x[..., :-1, :]` has one slice; before 2.9 it had two."""
    import torch

    from memplan.tape.software import version_numbers
    from memplan.tape.views import WHOLE_SLICES_SKIPPED

    node = torch.zeros(2, 3, 4, requires_grad=True)[..., :-1, :].grad_fn
    names = []
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None

    assert (1 if version_numbers(torch.__version__) >= WHOLE_SLICES_SKIPPED else 2) == names.count(
        "SliceBackward0"
    )
