"""NPT tensors to a safetensors file and back; the base model is never in it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from memplan.errors import ModelError, RunError
from memplan.job.spec import Npt
from memplan.npt.block import NptBlock
from memplan.npt.conversion import npt_blocks

FORMAT = "memplan-npt-1"
_BASE_FIELDS = ("model_type", "hidden_size", "intermediate_size")


def save_npt(model: nn.Module, path: str | Path) -> None:
    """
    Write the trained tensors of every converted block, as `layers.<index>.A` and so on, with what they belong to as
    metadata.

    Raises `RunError` where the model has no NPT blocks or the file cannot be written.
    """
    blocks = npt_blocks(model)
    metadata = {"format": FORMAT} | {
        key: json.dumps(value) for key, value in _describe(model, blocks).items()
    }
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in _tensors(blocks).items()}, path, metadata=metadata
        )
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path} cannot be written: {error}", hint="check the folder and the free space"
        ) from error


def load_npt(model: nn.Module, path: str | Path) -> None:
    """
    Copy a file's NPT tensors into a converted model, whatever the dtype and device of either.

    Raises `ModelError` where the file belongs to another base model, and `RunError` where it cannot be read
    or its NPT layers are not those of `model`; both name every difference. The model is then unchanged.
    """
    blocks = npt_blocks(model)
    expected = _describe(model, blocks)
    found, tensors = _read(Path(path))
    differences = [key for key in expected if expected[key] != found.get(key)]
    if differences:
        told = "; ".join(
            f"{key} is {found.get(key)} in the file, {expected[key]} in the model" for key in differences
        )
        if any(key in _BASE_FIELDS for key in differences):
            raise ModelError(
                f"{path} belongs to another base model: {told}", hint="load it into the model it came from"
            )
        raise RunError(
            f"{path} holds other NPT layers: {told}", hint="convert the model with the job that saved them"
        )
    parameters = _tensors(blocks)
    for name, parameter in parameters.items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            held = f"shape {tuple(tensors[name].shape)}" if name in tensors else "nothing"
            raise RunError(
                f"{path} holds {held} for {name}, where the model has shape {tuple(parameter.shape)}",
                hint="the file is damaged: use another checkpoint",
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def saved_npt(path: str | Path) -> Npt:
    """What to `convert` a fresh base model with, so that `load_npt` fits; other settings are defaults."""
    found, _ = _read(Path(path))
    settings = {field.name: found[field.name] for field in fields(Npt) if field.name in found}
    return Npt(**settings | {"layers": tuple(found["layers"])})


def _tensors(blocks: list[NptBlock]) -> dict[str, torch.Tensor]:
    named = (
        (f"layers.{block.npt_layer}.{name}", tensor)
        for block in blocks
        for name, tensor in block.np.named_parameters()
    )
    return {name: tensor.detach() for name, tensor in named}


def _describe(model: nn.Module, blocks: list[NptBlock]) -> dict[str, Any]:
    """What must agree between a file and a model."""
    if not blocks:
        raise RunError(f"{type(model).__name__} has no NPT blocks", hint="convert the model first")
    modulator = blocks[0].np
    configs = (module.config for module in model.modules() if hasattr(module, "config"))
    return {
        "model_type": next(configs).model_type,
        "hidden_size": modulator.A.shape[0],
        "intermediate_size": modulator.B.shape[1],
        **modulator.settings(),
        "layers": [block.npt_layer for block in blocks],
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and tensors of an NPT file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise RunError(
                    f"{path} is not a file of NPT layers", hint="give a file that save_npt has written"
                )
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path} cannot be read: {error}", hint="give a file that save_npt has written"
        ) from error
    return {key: json.loads(value) for key, value in metadata.items() if key != "format"}, tensors
