"""
The file of a LoRA adapter as peft writes it: what is in it, whether it can be added to weights, and what it adds.

    adapter_config.json         rank, alpha and their exceptions by layer
    adapter_model.safetensors   base_model.model.{layer}.lora_A.weight (r, in) and .lora_B.weight (out, r), and
                                base_model.model.{module}.token_adapter.trainable_tokens_delta (K, d): whole rows
                                base_model.model.{module}.weight: all of a module in `modules_to_save`
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from memplan.errors import RunError
from memplan.job.targets import matches

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_WITHOUT_EFFECT = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "task_type",
    "trainable_token_indices", "use_rslora",
}  # fmt: skip
"""Settings that say where adapters are, or that are taken account of here. All others must be off."""

_PLAIN_STARTS = (True, False, "gaussian")
"""`init_lora_weights` that leave the base as it was. Others (PiSSA, OLoRA, ...) move a part of it to the adapter."""

_PREFIX = "base_model.model."
_ROWS = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_WHOLE = re.compile(r"base_model\.model\.(?P<module>.+)\.(weight|bias)")
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True)
class AdapterFile:
    """The low-rank matrices of every adapted layer, by the layer's name in transformers' model."""

    folder: Path
    config: dict[str, Any]
    layers: tuple[str, ...]
    modules_with_rows: tuple[str, ...] = ()
    """Embeddings and heads of which the adapter holds the rows of some tokens."""
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the trained tensors of modules in `modules_to_save`, by their names in the model."""

    def whole_tensor(self, name: str) -> Tensor:
        """A trained tensor that takes the place of that of the base."""
        from safetensors import safe_open

        with safe_open(self.folder / WEIGHTS, framework="pt") as tensors:
            return tensors.get_tensor(f"{_PREFIX}{name}")

    def token_ids(self, module: str) -> list[int]:
        """Which rows of a module the adapter holds, in its order."""
        indices = self.config["trainable_token_indices"]
        if isinstance(indices, dict):
            indices = next(ids for name, ids in indices.items() if module.endswith(name))
        return [int(number) for number in indices]

    def token_rows(self, module: str) -> Tensor:
        """The rows (K, d) that take the places of those of the base."""
        from safetensors import safe_open

        with safe_open(self.folder / WEIGHTS, framework="pt") as tensors:
            return tensors.get_tensor(f"base_model.model.{module}.token_adapter.trainable_tokens_delta")

    def delta(self, layer: str) -> Tensor:
        """What the adapter adds to the weight (out, in) of a layer, in float32: scale * B A."""
        from safetensors import safe_open

        with safe_open(self.folder / WEIGHTS, framework="pt") as tensors:
            a, b = (tensors.get_tensor(_key(layer, part)).float() for part in "AB")
        return (b @ a).mul_(self._scale(layer, a.shape[0]))

    def _scale(self, layer: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised adapters (peft/tuners/lora/layer.py, update_layer)."""
        alpha: float = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_adapter(folder: Path) -> AdapterFile:
    """
    The adapter in a folder, checked.

    Raises:
        RunError: it cannot be read, or is more than matrices beside linear layers, rows of tokens and whole modules.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as tensors:
            keys = list(tensors.keys())
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in keys}
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(
            f"the adapter in `{folder}` cannot be read: {error}",
            hint=f"name a run, or a folder with {CONFIG} and {WEIGHTS}",
        ) from error
    _check_config(config)
    saved = tuple(config.get("modules_to_save") or ())
    layers, whole = set(), {}
    rows = [match["module"] for key in keys if (match := _ROWS.fullmatch(key))]
    for key in keys:
        if _ROWS.fullmatch(key):
            continue
        match = _WHOLE.fullmatch(key)
        if match is not None and matches(saved, match["module"]):
            whole[key.removeprefix(_PREFIX)] = shapes[key]
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise RunError(
                f"the adapter in `{folder}` holds `{key}`, which is no matrix beside a linear layer "
                "and not of `modules_to_save`",
                hint="merge it with peft's `merge_and_unload`",
            )
        layers.add(match["layer"])
    missing = [_key(layer, part) for layer in layers for part in "AB" if _key(layer, part) not in keys]
    if missing or not layers:
        what = f"lacks `{missing[0]}`" if missing else "is empty"
        raise RunError(f"the adapter in `{folder}` {what}", hint="save it again with the peft that made it")
    return AdapterFile(folder, config, tuple(sorted(layers)), tuple(sorted(rows)), whole)


def _check_config(config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RunError(
            f"adapters of type `{kind}` cannot be merged here, LoRA only", hint="merge them with peft"
        )
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise RunError(
            f"the adapter was made with `init_lora_weights: {config['init_lora_weights']}`, which changed the base too",
            hint="merge it with peft, beside the base that it saved",
        )
    harmless: tuple[Any, ...] = (None, False, [], {}, "", "none")
    for name, value in config.items():
        if name not in _WITHOUT_EFFECT and name != "init_lora_weights" and value not in harmless:
            raise RunError(
                f"the adapter uses `{name}`, which cannot be merged here: plain LoRA only",
                hint="merge it with peft's `merge_and_unload`",
            )


def _key(layer: str, part: str) -> str:
    return f"base_model.model.{layer}.lora_{part}.weight"
