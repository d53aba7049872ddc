"""Names, shapes, order and count of every tensor are those of transformers, for every family."""

from __future__ import annotations

from typing import Any

import pytest

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
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
        )


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
        assert expected == [(buffer.name, buffer.shape, buffer.dtype) for buffer in actual]

    def test_linear_modules(self, config: dict[str, Any]) -> None:
        """Every Linear and Conv1D in the order of `named_modules()`, with its weight's shape and its bias."""
        expected = [
            (name, tuple(module.weight.shape), module.bias is not None, type(module).__name__ == "Conv1D")
            for name, module in on_meta(config).named_modules()
            if type(module).__name__ in ("Linear", "Conv1D")
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
        if ours.family == "gpt2":
            expected = (theirs.attn_pdrop, theirs.resid_pdrop, theirs.embd_pdrop, theirs.activation_function)
        else:
            expected = (theirs.attention_dropout, 0.0, 0.0, theirs.hidden_act)

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


def test_linear_modules_of_a_tied_model_include_the_head() -> None:
    """A tied head has no parameter of its own but is still a layer, with the head's shape."""
    architecture = architecture_of(CONFIGS["qwen2, tied"])
    head = linear_modules(architecture)[-1]

    assert ("lm_head", 64, 130, None) == (head.name, head.in_features, head.out_features, head.layer)
    assert "lm_head.weight" not in [p.name for p in parameters(architecture)]
