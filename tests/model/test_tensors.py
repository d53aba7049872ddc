"""Names, shapes, order and count of every tensor are those of transformers, for every family."""

from __future__ import annotations

from typing import Any

import pytest

from installed import installed_transformers
from memplan.model import architecture_from_config, buffers, linear_modules, num_parameters, parameters
from memplan.model.architecture import Architecture

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 130,
    "max_position_embeddings": 40,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama, tied, biases": {
        "model_type": "llama",
        **SIZES,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama, head_dim, all key heads": {
        "model_type": "llama",
        **SIZES,
        "num_key_value_heads": None,
        "head_dim": 24,
    },
    "llama 3 rotary": {
        "model_type": "llama",
        **SIZES,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 20,
        },
    },
    "mistral": {"model_type": "mistral", **SIZES, "head_dim": 32},
    "mistral without key_value_heads": {
        "model_type": "mistral",
        **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        "num_attention_heads": 16,
    },
    "qwen2": {"model_type": "qwen2", **SIZES},
    "qwen2, tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "qwen2, some blocks slide": {
        "model_type": "qwen2",
        **SIZES,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **SIZES},
    "qwen3, biases, tied": {
        "model_type": "qwen3",
        **SIZES,
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "granite": {"model_type": "granite", **SIZES},
    "granite, tied, biases": {
        "model_type": "granite",
        **SIZES,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 4},
    "mixtral, head_dim, one expert per token": {
        "model_type": "mixtral",
        **SIZES,
        "head_dim": 32,
        "num_experts_per_tok": 1,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **SIZES, "num_experts": 8, "moe_intermediate_size": 48},
    "gpt_neox": {
        "model_type": "gpt_neox",
        **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        "rotary_pct": 0.5,
    },
    "gpt_neox, one branch after the other, dropout": {
        "model_type": "gpt_neox",
        **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        "use_parallel_residual": False,
        "hidden_dropout": 0.1,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "falcon": {"model_type": "falcon", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3},
    "falcon, grouped": {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "ffn_hidden_size": 96,
        "vocab_size": 130,
    },
    "falcon, grouped, one norm, untied, dropout": {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
        "hidden_dropout": 0.1,
    },
    "gpt_bigcode": {
        "model_type": "gpt_bigcode",
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 3,
        "vocab_size": 130,
        "n_positions": 40,
    },
    "gpt_bigcode, all key heads": {
        "model_type": "gpt_bigcode",
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": 50,
        "multi_query": False,
    },
    "gemma": {"model_type": "gemma", **SIZES, "head_dim": 32, "hidden_act": "gelu"},
    "gemma, untied, biases": {
        "model_type": "gemma",
        **SIZES,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "gemma2": {"model_type": "gemma2", **SIZES, "head_dim": 32},
    "gemma3": {"model_type": "gemma3_text", **SIZES, "head_dim": 32, "num_hidden_layers": 7},
    "gemma3, all blocks slide": {"model_type": "gemma3_text", **SIZES, "sliding_window_pattern": 4},
    "phi3": {"model_type": "phi3", **SIZES, "pad_token_id": 0},
    "phi3, partial rotary, tied": {
        "model_type": "phi3",
        **SIZES,
        "pad_token_id": 0,
        "head_dim": 16,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
    "olmo": {"model_type": "olmo", **SIZES},
    "olmo, biases": {"model_type": "olmo", **SIZES, "attention_bias": True, "clip_qkv": 8.0},
    "olmo2": {"model_type": "olmo2", **SIZES},
    "olmo3": {"model_type": "olmo3", **SIZES, "num_hidden_layers": 5},
    "bert": {
        "model_type": "bert",
        **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        "type_vocab_size": 3,
    },
    "bert, the defaults": {"model_type": "bert", "num_hidden_layers": 1},
    "gpt2": {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 3, "vocab_size": 130},
    "gpt2, untied, inner": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 3,
        "vocab_size": 130,
        "n_inner": 50,
        "n_positions": 20,
        "tie_word_embeddings": False,
    },
}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """What memplan reads from a config."""
    return architecture_from_config(config, name="small", source="test")


def on_meta(config: dict[str, Any]) -> Any:
    """The model that transformers builds from the same keys, without storage."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    keys = dict(config)
    masked = keys["model_type"] == "bert"
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(transformers.AutoConfig.for_model(keys.pop("model_type"), **keys))


@pytest.mark.torch
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
class TestAgainstTransformers:
    """Held to the model itself, built on meta tensors."""

    def test_parameters(self, config: dict[str, Any]) -> None:
        """Names, shapes and order equal `named_parameters()`."""
        expected = [(name, tuple(parameter.shape)) for name, parameter in on_meta(config).named_parameters()]

        assert expected == [
            (parameter.name, parameter.shape) for parameter in parameters(architecture_of(config))
        ]

    def test_buffers(self, config: dict[str, Any]) -> None:
        """Names, shapes and dtypes equal `named_buffers()`."""
        expected = [
            (name, tuple(buffer.shape), str(buffer.dtype).removeprefix("torch."))
            for name, buffer in on_meta(config).named_buffers()
        ]

        actual = buffers(architecture_of(config))
        of_weights = "float32"
        assert expected == [(buffer.name, buffer.shape, buffer.dtype or of_weights) for buffer in actual]

    def test_linear_modules(self, config: dict[str, Any]) -> None:
        """Every Linear and Conv1D in the order of `named_modules()`, with its weight's shape and its bias."""
        expected = [
            (name, tuple(module.weight.shape), module.bias is not None, type(module).__name__ == "Conv1D")
            for name, module in on_meta(config).named_modules()
            if type(module).__name__ in ("Linear", "FalconLinear", "Conv1D")
        ]

        assert expected == [
            (linear.name, linear.weight_shape, linear.bias, linear.transposed)
            for linear in linear_modules(architecture_of(config))
        ]

    def test_attention_pattern(self, config: dict[str, Any]) -> None:
        """The window, and which blocks slide where they differ, equal those of the config class."""
        theirs, ours = on_meta(config).config, architecture_of(config)
        kinds = tuple(getattr(theirs, "layer_types", None) or ())

        assert getattr(theirs, "sliding_window", None) == ours.sliding_window
        assert (kinds if len(set(kinds)) > 1 else ()) == ours.layer_types

    def test_dropouts_and_activation(self, config: dict[str, Any]) -> None:
        """Defaults of the config class are ours."""
        theirs, ours = on_meta(config).config, architecture_of(config)
        if ours.family == "falcon":
            expected = (0.0, theirs.hidden_dropout, 0.0, theirs.activation)
        elif ours.family == "gpt_neox":
            dropout = theirs.hidden_dropout  # also that of the embeddings
            expected = (theirs.attention_dropout, dropout, dropout, theirs.hidden_act)
        elif ours.family == "bert":
            dropout = theirs.hidden_dropout_prob
            expected = (theirs.attention_probs_dropout_prob, dropout, dropout, theirs.hidden_act)
        elif ours.family in ("gpt2", "gpt_bigcode"):
            expected = (theirs.attn_pdrop, theirs.resid_pdrop, theirs.embd_pdrop, theirs.activation_function)
        else:
            activation = theirs.hidden_act if hasattr(theirs, "hidden_act") else theirs.hidden_activation
            if ours.family == "gemma" and installed_transformers() < (5, 18):
                # Until then transformers ran the exact gelu where an old config said so; the bytes are the same.
                assert activation == config.get("hidden_act", "gelu_pytorch_tanh")
                activation = ours.hidden_act
            expected = (theirs.attention_dropout, 0.0, 0.0, activation)

        assert expected == (
            ours.attention_dropout, ours.residual_dropout, ours.embedding_dropout, ours.hidden_act,
        )  # fmt: skip
        assert theirs.max_position_embeddings == ours.max_position_embeddings


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_count_is_the_sum(config: dict[str, Any]) -> None:
    """`num_parameters` counts one block and multiplies; the sum over `parameters` agrees."""
    architecture = architecture_of(config)

    assert sum(p.num_elements for p in parameters(architecture)) == num_parameters(architecture)


def test_roles_and_layers() -> None:
    """A parameter knows what it is and which block it belongs to."""
    seen = {p.name: (p.role, p.layer) for p in parameters(architecture_of(CONFIGS["qwen3"]))}

    assert ("embedding", None) == seen["model.embed_tokens.weight"]
    assert ("linear", 2) == seen["model.layers.2.mlp.down_proj.weight"]
    assert ("norm", 1) == seen["model.layers.1.self_attn.q_norm.weight"]
    assert ("norm", None) == seen["model.norm.weight"]
    assert ("head", None) == seen["lm_head.weight"]
    gpt2 = {p.name: (p.role, p.layer) for p in parameters(architecture_of(CONFIGS["gpt2"]))}
    assert ("norm", 0) == gpt2["transformer.h.0.ln_1.bias"]
    assert ("bias", 1) == gpt2["transformer.h.1.mlp.c_fc.bias"]
    assert ("embedding", None) == gpt2["transformer.wpe.weight"]


def test_experts_are_bare_parameters() -> None:
    """Stacked weights are called as transformers calls them, and are no linear layers; neither is the router."""
    architecture = architecture_of(CONFIGS["mixtral"])
    seen = {p.name: (p.role, p.shape) for p in parameters(architecture) if ".mlp." in p.name and p.layer == 1}

    assert seen == {
        "model.layers.1.mlp.gate.weight": ("router", (4, 64)),
        "model.layers.1.mlp.experts.gate_up_proj": ("experts", (4, 192, 64)),
        "model.layers.1.mlp.experts.down_proj": ("experts", (4, 64, 96)),
    }
    assert not [linear for linear in linear_modules(architecture) if ".mlp." in linear.name]


def test_linear_modules_of_a_tied_model_include_the_head() -> None:
    """A tied head has no parameter of its own but is still a layer, with the head's shape."""
    architecture = architecture_of(CONFIGS["qwen2, tied"])
    head = linear_modules(architecture)[-1]

    assert ("lm_head", 64, 130, None) == (head.name, head.in_features, head.out_features, head.layer)
    assert "lm_head.weight" not in [p.name for p in parameters(architecture)]
