"""
Weights of a run in the format that peft or transformers loads, gathered from all ranks, tensor by tensor.

A full model is written in files of at most `FILE_BYTES`, so that the first rank never holds more than one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from memplan.train.build import Built
from memplan.train.group import Group
from memplan.train.parallel import Parallel
from memplan.train.training_state import whole_on_first

FILE_BYTES = 4 << 30
_GENERATION = "generation_config.json"
_INDEX = "model.safetensors.index.json"


def complete_model(folder: Path, built: Built, source: str | None, config: dict[str, Any]) -> None:
    """
    Put beside the weights of a whole model what `from_pretrained` and vLLM read besides: a config that names the class,
    the dtype and whether to cache, and how the base generates.

    Args:
        source: the base, a folder or hub id, whose generation config is taken; None for random weights.
        config: the `config.json` of the base.
    """
    model: Any = built.model
    path = folder / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["architectures"] = [type(model).__name__]
    saved["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    saved["use_cache"] = config.get("use_cache", True)  # training turns it off
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = None
    if source is not None:
        from transformers.utils.hub import cached_file

        generation = cached_file(
            source, _GENERATION,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    if generation is not None:
        (folder / _GENERATION).write_bytes(Path(generation).read_bytes())
    elif model.can_generate():
        from transformers import GenerationConfig

        GenerationConfig.from_model_config(model.config).save_pretrained(folder)


def save_weights(folder: Path, built: Built, parallel: Parallel, *, file_bytes: int = FILE_BYTES) -> None:
    """
    Write what was trained into `folder`; every rank calls it, the first one writes.

    Raises:
        OSError, RunError, SafetensorError: on the first rank, after it has gathered with the others to the end.
    """
    group = parallel.group
    if not parallel.is_sharded or built.method == "npt":
        # Whole on every rank already.
        if group.is_first:
            built.save_weights(folder)
        return
    if built.method == "full":
        _save_full(folder, built, group, file_bytes)
        return
    gathered = {name: whole_on_first(tensor, group) for name, tensor in parallel.trainable.items()}
    if group.is_first:
        model: Any = built.model
        model.save_pretrained(folder, state_dict=gathered, save_embedding_layers=False)


def _save_full(folder: Path, built: Built, group: Group, file_bytes: int) -> None:
    model: Any = built.model
    files = _files(model, file_bytes)
    problem: Exception | None = None
    for number, names in enumerate(files, start=1):
        tensors = {name: whole_on_first(tensor, group) for name, tensor in names.items()}
        if not group.is_first or problem is not None:
            continue
        try:
            _write(folder / _file_name(number, len(files)), tensors)
        except Exception as error:  # the other ranks wait for us in the next gathering
            problem = error
        del tensors
    if problem is not None:
        raise problem
    if group.is_first:
        _write_index(folder, files)
        model.config.save_pretrained(folder)


def _files(model: Any, file_bytes: int) -> list[dict[str, Tensor]]:
    """Every tensor of a checkpoint, tied ones once, in files of `file_bytes` at most, or one tensor."""
    files: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in _checkpoint_tensors(model):
        num_bytes = tensor.numel() * tensor.element_size()
        if files[-1] and held + num_bytes > file_bytes:
            files.append({})
            held = 0
        files[-1][name] = tensor
        held += num_bytes
    return files


def _checkpoint_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor | None]) -> None:
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(whole, path, metadata={"format": "pt"})


def _write_index(folder: Path, files: list[dict[str, Tensor]]) -> None:
    if len(files) == 1:
        return
    where = {name: _file_name(number, len(files)) for number, names in enumerate(files, 1) for name in names}
    total = sum(tensor.numel() * tensor.element_size() for names in files for tensor in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
