"""
`config.json` to `Architecture`: the keys that decide memory, with the defaults of the model's class.

An absent key means what it means to `transformers/models/*/configuration_*.py`, which differs between classes
(`num_key_value_heads` of Mistral is 8, `head_dim` of Qwen3 is 128). Files of transformers 4 and 5 read alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from memplan.errors import ModelError, NotTrained, UnknownModel
from memplan.model.architecture import Architecture
from memplan.model.families import MODEL_TYPES, read
from memplan.model.keys import PROGRAMS_HINT, Keys
from memplan.model.stored import read_stored


def architecture_from_config(config: Mapping[str, Any], *, name: str, source: str) -> Architecture:
    """
    The architecture that `AutoModelForCausalLM.from_config` would build from this `config.json`.

    Raises `UnknownModel` for a class that the shape writer has no program for; `NotTrained` for one with another head
    than a language model's, and for checkpoints whose storage is not planned (`read_stored`); `ModelError`, naming the
    key, for a config that contradicts itself or lacks a size.
    """
    refuse_other_head(config, name)
    model_type = _supported_model_type(config, name)
    stored = read_stored(config, name)
    keys = Keys(config, name, MODEL_TYPES[model_type][0])
    return Architecture(
        name=name, source=source, stored=stored, stored_dtype=stored_dtype(config), **read(model_type, keys)
    )


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """
    dtype that a config says its checkpoint is stored in; None where it says none that is known.

    >>> stored_dtype({"torch_dtype": "bfloat16"}), stored_dtype({"dtype": "float8_e4m3fn"})
    ('bfloat16', None)
    """
    dtype = config.get("dtype") or config.get("torch_dtype")
    return dtype if dtype in ("float32", "bfloat16", "float16") else None


def class_name_of(config: Mapping[str, Any]) -> str | None:
    """The model class that a config names, e.g. `LlamaForCausalLM`; its `model_type` where it names none."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    return MODEL_TYPES[model_type][0] if model_type in MODEL_TYPES else model_type


def is_masked_lm(config: Mapping[str, Any]) -> bool:
    """Whether a config names an encoder that predicts masked tokens, such as `BertForMaskedLM`."""
    return (class_name_of(config) or "").endswith("ForMaskedLM")


def has_other_head(class_name: str) -> bool:
    """
    Whether a class of transformers has a head for labels, scores or spans over its hidden states.

    >>> has_other_head("LlamaForSequenceClassification"), has_other_head("LlamaForCausalLM")
    (True, False)
    """
    return _OTHER_HEAD.search(class_name) is not None


_OTHER_HEAD = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)$")


def refuse_other_head(config: Mapping[str, Any], name: str) -> None:
    """Raises `NotTrained` for a config that names a classifier, a reward model or the like: no language model."""
    class_name = class_name_of(config) or ""
    if has_other_head(class_name):
        raise NotTrained(
            f"{name} is a {class_name}, and jobs train language models",
            hint="give the Trainer of its script `MemplanCallback()`, which plans it; or `memplan.trace` a step of it",
        )


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
            f"{name} is a multimodal model ({class_name}): it is loaded with its other towers, and the shape writer "
            "knows text models only",
            hint=_text_part_hint(config["text_config"]),
        )
    if model_type is None:
        model_type = next((key for key, (known, _) in MODEL_TYPES.items() if known == class_name), None)
    if model_type not in MODEL_TYPES or MODEL_TYPES[model_type][0] != class_name:
        raise UnknownModel(
            f"{name} is a {class_name}, and the shape writer has no program for it", hint=PROGRAMS_HINT
        )
    return model_type


def _text_part_hint(text_config: Any) -> str:
    """What to do about a multimodal model: its text part alone may be one that is known."""
    model_type = text_config.get("model_type") if isinstance(text_config, Mapping) else None
    if model_type not in MODEL_TYPES:
        return PROGRAMS_HINT
    class_name = MODEL_TYPES[model_type][0]
    return (
        f"To plan its text part alone ({class_name}), save what is under `text_config` as a config.json and name that; "
        "to plan all of it, use `--engine trace`"
    )
