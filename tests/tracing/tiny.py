"""Tiny models of real architectures, as config.json has them, and jobs that train them."""

from __future__ import annotations

from typing import Any

from memplan.job.load import load_job
from memplan.job.spec import Job

_SIZES = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_SIZES},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None, **_SIZES},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_SIZES},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16, **_SIZES},
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 1000, "n_embd": 64,
        "n_layer": 6, "n_head": 4, "n_positions": 512,
    },
}  # fmt: skip
CONFIGS["granite"] = {
    "model_type": "granite", "architectures": ["GraniteForCausalLM"], "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "logits_scaling": 8.0, **_SIZES,
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_GEMMA = {"head_dim": 32, "tie_word_embeddings": True, **_TOKENS}
CONFIGS |= {
    "gemma": {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], **_SIZES, **_GEMMA},
    "gemma2": {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **_SIZES, **_GEMMA},
    "gemma3": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window": 96,
        "sliding_window_pattern": 3, **_SIZES, **_GEMMA,
    },
    "phi3": {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5, **_SIZES, **_TOKENS,
    },
    "olmo": {"model_type": "olmo", "architectures": ["OlmoForCausalLM"], "clip_qkv": 8.0, **_SIZES, **_TOKENS},
    "olmo2": {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], **_SIZES, **_TOKENS},
    "olmo3": {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "sliding_window": 96, **_SIZES, **_TOKENS},
    "gpt_neox": {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_dropout": 0.1, **_SIZES, **_TOKENS,
    },
    "mixtral": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
        "num_experts_per_tok": 2, **_SIZES, **_TOKENS,
    },
    "falcon": {
        "model_type": "falcon", "architectures": ["FalconForCausalLM"], "vocab_size": 1000, "hidden_size": 64,
        "num_hidden_layers": 6, "num_attention_heads": 4, **_TOKENS,
    },
    "gpt_bigcode": {
        "model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"], "vocab_size": 1000, "n_embd": 64,
        "n_layer": 6, "n_head": 4, "n_positions": 512, **_TOKENS,
    },
    "bert": {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 1000, "hidden_size": 64,
        "intermediate_size": 176, "num_hidden_layers": 6, "num_attention_heads": 4,
    },
}  # fmt: skip
CONFIGS["gemma"]["num_key_value_heads"] = 1
CONFIGS["falcon, grouped"] = CONFIGS["falcon"] | {"new_decoder_architecture": True, "num_kv_heads": 2}
CONFIGS["llama, as many key heads"] = CONFIGS["llama"] | {"num_key_value_heads": 4}
CONFIGS["llama, wide heads"] = CONFIGS["llama"] | {"head_dim": 320}
CONFIGS["mistral, sliding"] = CONFIGS["mistral"] | {"sliding_window": 96}
CONFIGS["qwen2, tied"] = CONFIGS["qwen2"] | {"tie_word_embeddings": True}
CONFIGS["granite, biased"] = CONFIGS["granite"] | {
    "attention_bias": True, "mlp_bias": True, "attention_dropout": 0.1, "tie_word_embeddings": True,
}  # fmt: skip


def job(**fields: Any) -> Job:
    """A job of 2 x 128 tokens with the full loss; double underscores stand for dots."""
    settings = {
        "model": "tiny",
        "micro_batch_size": 2,
        "max_seq_len": 128,
        "method": "full",
        "loss": "full",
    } | fields
    return load_job(None, [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]).job
