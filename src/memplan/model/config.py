"""
`config.json` to `Architecture`: the keys that decide memory, with the defaults of the model's class.

An absent key means what it means to `transformers/models/*/configuration_*.py`, which differs between classes
(`num_key_value_heads` of Mistral is 8, `head_dim` of Qwen3 is 128). Files of transformers 4 and 5 read alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from memplan.errors import ModelError, UnknownModel
from memplan.model.architecture import Architecture

PROGRAMS_HINT = (
    "this version plans Llama, Mistral, Qwen2, Qwen3 and GPT-2; `memplan models` lists those known by name"
)

_REQUIRED: Any = object()


def architecture_from_config(config: Mapping[str, Any], *, name: str, source: str) -> Architecture:
    """
    The architecture that `AutoModelForCausalLM.from_config` would build from this `config.json`.

    Raises `UnknownModel` for a class that the shape writer has no program for, and for checkpoints that are
    stored quantised; `ModelError`, naming the key, for a config that contradicts itself or lacks a size.
    """
    model_type = _supported_model_type(config, name)
    _refuse_quantized(config, name)
    class_name, read = _CLASSES[model_type]
    return Architecture(name=name, source=source, **read(_Keys(config, name, class_name)))


def class_name_of(config: Mapping[str, Any]) -> str | None:
    """The model class that a config names, e.g. `LlamaForCausalLM`; its `model_type` where it names none."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    return _CLASSES[model_type][0] if model_type in _CLASSES else model_type


def is_supported(config: Mapping[str, Any]) -> bool:
    """Whether the shape writer has a program for the class that this config names."""
    try:
        _supported_model_type(config, "")
    except (ModelError, UnknownModel):
        return False
    return True


def _supported_model_type(config: Mapping[str, Any], name: str) -> str:
    class_name, model_type = class_name_of(config), config.get("model_type")
    if class_name is None:
        raise ModelError(
            f"The config of {name} names neither `model_type` nor `architectures`",
            hint="Name the config.json of a transformers model",
        )
    if "text_config" in config:
        raise UnknownModel(
            f"{name} is a multimodal model ({class_name}), and the shape writer knows text models only",
            hint=PROGRAMS_HINT,
        )
    if model_type is None:
        model_type = next((key for key, (known, _) in _CLASSES.items() if known == class_name), None)
    if model_type not in _CLASSES or _CLASSES[model_type][0] != class_name:
        raise UnknownModel(
            f"{name} is a {class_name}, and the shape writer has no program for it", hint=PROGRAMS_HINT
        )
    return model_type


def _refuse_quantized(config: Mapping[str, Any], name: str) -> None:
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnknownModel(
            f"The weights of {name} are stored quantised ({method or 'method not stated'}), "
            "and only 4-bit storage made at loading is understood",
            hint="Name the checkpoint it was made from, with `method: qlora` to store the base in 4 bits",
        )


class _Keys:
    """Reads one config; every failure names the key, its value and what was expected."""

    def __init__(self, config: Mapping[str, Any], name: str, class_name: str) -> None:
        self._config = config
        self._name = name
        self._class_name = class_name

    def size(self, *keys: str, default: Any = _REQUIRED) -> int:
        """A positive integer under the first of `keys` that is present; null counts as absent."""
        value = next((self._config[key] for key in keys if self._config.get(key) is not None), default)
        if value is _REQUIRED:
            raise self._error(f"has no `{keys[0]}`")
        return self._positive(keys[0], value)

    def optional_size(self, key: str, default: int | None) -> int | None:
        """As `size`, but an explicit null means None and not the default."""
        value = self._config.get(key, default)
        return None if value is None else self._positive(key, value)

    def count(self, key: str, default: int) -> int:
        """An integer from 0 on."""
        value = self._config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._expected(key, value, "an integer from 0 on")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._config.get(key, default)
        if not isinstance(value, bool):
            raise self._expected(key, value, "true or false")
        return value

    def probability(self, key: str, default: float) -> float:
        value = self._config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self._expected(key, value, "a number in [0, 1)")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._config.get(key, default)
        if not isinstance(value, str):
            raise self._expected(key, value, "a name")
        return value

    def layer_types(self, num_hidden_layers: int) -> tuple[str, ...] | None:
        """The kind of attention of each block, None where the config leaves it to other keys."""
        value = self._config.get("layer_types")
        if value is None:
            return None
        known = ("full_attention", "sliding_attention")
        if (
            not isinstance(value, list)
            or len(value) != num_hidden_layers
            or any(k not in known for k in value)
        ):
            raise self._error(f"has `layer_types` that are no list of {num_hidden_layers} of {known}")
        return tuple(value)

    def must_divide(self, divisor_key: str, divisor: int, key: str, value: int) -> None:
        if value % divisor:
            raise self._error(f"has `{key}: {value}`, which is no multiple of `{divisor_key}: {divisor}`")

    def must_be_even(self, key: str, value: int) -> None:
        """Rotary embeddings turn pairs of channels."""
        if value % 2:
            raise self._error(f"has `{key}: {value}`, where rotary embeddings need an even number")

    def refuse(self, key: str) -> None:
        """A variant of the class that the shape writer does not cover."""
        if self._config.get(key):
            message = f"{self._name} has `{key}: true`, a variant of {self._class_name} that has no program"
            raise UnknownModel(message, hint=PROGRAMS_HINT)

    def _positive(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._expected(key, value, "a positive integer")
        return value

    def _expected(self, key: str, value: Any, what: str) -> ModelError:
        return self._error(f"has `{key}: {json.dumps(value)}`, where {what} was expected")

    def _error(self, what: str) -> ModelError:
        return ModelError(
            f"The config of {self._name} ({self._class_name}) {what}",
            hint="Compare it with the config.json of the model on the hub",
        )


def _decoder(
    keys: _Keys,
    *,
    key_value_heads: int | None,
    head_dim: int | None,
    max_position_embeddings: int,
) -> dict[str, Any]:
    """What Llama, Mistral and Qwen share; the arguments are defaults of absent keys, None for derived."""
    hidden_size = keys.size("hidden_size")
    heads = keys.size("num_attention_heads")
    head_dim = keys.optional_size("head_dim", head_dim)
    if head_dim is None:
        keys.must_divide("num_attention_heads", heads, "hidden_size", hidden_size)
        head_dim = hidden_size // heads
    keys.must_be_even("head_dim", head_dim)
    key_value_heads = keys.optional_size("num_key_value_heads", key_value_heads) or heads
    keys.must_divide("num_key_value_heads", key_value_heads, "num_attention_heads", heads)
    return {
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("intermediate_size"),
        "num_hidden_layers": keys.size("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "vocab_size": keys.size("vocab_size"),
        "max_position_embeddings": keys.size("max_position_embeddings", default=max_position_embeddings),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", False),
        "hidden_act": keys.text("hidden_act", "silu"),
        "attention_dropout": keys.probability("attention_dropout", 0.0),
    }


def _llama(keys: _Keys) -> dict[str, Any]:
    sizes = _decoder(keys, key_value_heads=None, head_dim=None, max_position_embeddings=2048)
    keys.must_divide("num_attention_heads", sizes["num_attention_heads"], "hidden_size", sizes["hidden_size"])
    bias = keys.flag("attention_bias", False)
    return {
        "family": "llama",
        **sizes,
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": keys.flag("mlp_bias", False),
    }


def _mistral(keys: _Keys) -> dict[str, Any]:
    sizes = _decoder(keys, key_value_heads=8, head_dim=None, max_position_embeddings=131072)
    return {"family": "llama", **sizes, "sliding_window": keys.optional_size("sliding_window", 4096)}


def _qwen2(keys: _Keys) -> dict[str, Any]:
    sizes = _decoder(keys, key_value_heads=32, head_dim=None, max_position_embeddings=32768)
    return {
        "family": "qwen2",
        **sizes,
        "attention_bias": True,
        **_qwen_window(keys, sizes["num_hidden_layers"]),
    }


def _qwen3(keys: _Keys) -> dict[str, Any]:
    sizes = _decoder(keys, key_value_heads=32, head_dim=128, max_position_embeddings=32768)
    bias = keys.flag("attention_bias", False)
    return {
        "family": "qwen3",
        **sizes,
        "attention_bias": bias,
        "attention_output_bias": bias,
        "qk_norm": True,
        **_qwen_window(keys, sizes["num_hidden_layers"]),
    }


def _qwen_window(keys: _Keys, num_hidden_layers: int) -> dict[str, Any]:
    """Qwen slides only if `use_sliding_window`, and then in the blocks from `max_window_layers` on."""
    if not keys.flag("use_sliding_window", False):
        return {}
    window = keys.optional_size("sliding_window", 4096)
    if window is None:
        return {}
    first = keys.count("max_window_layers", 28)
    layer_types = keys.layer_types(num_hidden_layers) or tuple(
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_hidden_layers)
    )
    kinds = set(layer_types)
    if kinds == {"full_attention"}:
        return {}
    return {"sliding_window": window, "layer_types": layer_types if len(kinds) > 1 else ()}


def _gpt2(keys: _Keys) -> dict[str, Any]:
    keys.refuse("add_cross_attention")
    keys.refuse("reorder_and_upcast_attn")
    hidden_size = keys.size("n_embd", "hidden_size")
    heads = keys.size("n_head", "num_attention_heads")
    keys.must_divide("n_head", heads, "n_embd", hidden_size)
    return {
        "family": "gpt2",
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("n_inner", default=4 * hidden_size),
        "num_hidden_layers": keys.size("n_layer", "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden_size // heads,
        "vocab_size": keys.size("vocab_size"),
        "max_position_embeddings": keys.size("n_positions", "max_position_embeddings", default=1024),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", True),
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "hidden_act": keys.text("activation_function", "gelu_new"),
        "attention_dropout": keys.probability("attn_pdrop", 0.1),
        "residual_dropout": keys.probability("resid_pdrop", 0.1),
        "embedding_dropout": keys.probability("embd_pdrop", 0.1),
    }


_CLASSES: dict[str, tuple[str, Callable[[_Keys], dict[str, Any]]]] = {
    "llama": ("LlamaForCausalLM", _llama),
    "mistral": ("MistralForCausalLM", _mistral),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
}
"""`model_type` to the class that `AutoModelForCausalLM` builds and the reader of its config."""
