"""
Weights from safetensors files, file by file and tensor by tensor, under the names and in the layout that the
installed transformers has for them.

A file is mapped, read and closed before the next one is opened, so that no more than one of them is ever in RAM.
Where tensors of the model are made of several of the checkpoint (the experts of a block, say), those of earlier files
are kept until the last one is there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from memplan.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Place = Callable[[str, Tensor], None]
"""Takes a tensor of the model by its name. It lies in a mapped file, so whoever keeps it copies it."""


def find_files(source: str) -> list[Path]:
    """
    The safetensors files of a model; empty if it has none.

    Args:
        source: a local folder, or a hub id, whose files are downloaded where they are not yet.

    Raises:
        OSError: the hub cannot be reached, or knows no such model.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    whole = cached_file(source, WEIGHTS, _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        return [Path(whole)]
    index = cached_file(source, INDEX, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return []
    return sorted(Path(file) for file in get_checkpoint_shard_files(source, index)[0])


def load_streamed(model: Any, names: Collection[str], files: list[Path], place: Place) -> None:
    """
    Give every tensor of the files that the model has a name for to `place`, in the order of the files.

    Args:
        model: a `PreTrainedModel`, for its rules about names and layouts; its tensors are not touched.
        names: those of the model's tensors, as in its `state_dict()`.
        files: what `find_files` found.
        place: gets (name, tensor on the CPU).

    Raises:
        ModelError: a file cannot be read, or its tensors cannot be brought into the model's layout.
    """
    by_file: dict[Path, list[Target]] = {file: [] for file in files}
    kept_from: dict[Path, list[str]] = {file: [] for file in files}
    for target in find_targets(model, names, files):
        last = max((source.file for source in target.sources), key=files.index)
        by_file[last].append(target)
        for source in target.sources:
            if source.file != last:
                kept_from[source.file].append(source.name)
    kept: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as tensors:
            for target in by_file[file]:
                for name, tensor in _converted(target, model, tensors, kept):
                    place(name, tensor)
            for name in kept_from[file]:
                kept[name] = tensors.get_tensor(name).clone()


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint, and the pattern of the converter that takes it."""

    name: str
    file: Path
    pattern: str | None


@dataclass
class Target:
    """A tensor of the model, or the first of those that are made together, and what it is made of."""

    name: str
    converter: Any = None
    """A WeightConverter of transformers; None where the tensor is taken as it is."""
    sources: list[Source] = field(default_factory=list)


def find_targets(model: Any, names: Collection[str], files: list[Path]) -> list[Target]:
    """
    What transformers makes of the names in the files (core_model_loading.py): renaming, then at most one converter;
    names that the model does not have are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, known = model.base_model_prefix, dict.fromkeys(names)
    targets: dict[str, Target] = {}
    for source, file in sorted(_names(files).items(), key=lambda item: dot_natural_key(item[0])):
        name, pattern = rename_source_key(source, renamings, converters, prefix, known)
        if name not in known and source in known:
            name, pattern = rename_source_key(source, [], [], prefix, known)
        if name not in known:
            continue
        if name not in targets:
            targets[name] = Target(name, deepcopy(by_pattern[pattern]) if pattern is not None else None)
        targets[name].sources.append(Source(source, file, pattern))
    return list(targets.values())


def _names(files: list[Path]) -> dict[str, Path]:
    names = {}
    for file in files:
        with _opened(file) as tensors:
            names.update(dict.fromkeys(tensors.keys(), file))
    return names


def _converted(
    target: Target, model: Any, tensors: Any, kept: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the model, from an open file and what was kept of earlier ones."""
    read = [
        kept.pop(source.name) if source.name in kept else tensors.get_tensor(source.name)
        for source in target.sources
    ]
    if target.converter is None:
        yield target.name, read[-1]
        return
    for source, tensor in zip(target.sources, read):
        target.converter.add_tensor(target.name, source.name, source.pattern, lambda tensor=tensor: tensor)
    read.clear()
    try:
        made = target.converter.convert(target.name, model=model, config=model.config)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"`{target.name}` cannot be made of `{target.sources[0].name}` and the like: {error}",
            hint="weights and config.json must be of the same model",
        ) from error
    for name, tensor in made.items():
        yield name, tensor[0] if isinstance(tensor, list) else tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the weights in `{file}` cannot be read: {error}", hint="copy or download the file again"
        ) from error
