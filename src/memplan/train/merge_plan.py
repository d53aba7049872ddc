"""What `memplan merge` does to the files of a base: which tensors an adapter adds to, replaces, or unties."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memplan.errors import ModelError, RunError
from memplan.job.spec import Job
from memplan.job.targets import matches
from memplan.model import resolve_config
from memplan.model.catalogue import find_hub_id
from memplan.tape.vocabulary import num_embeddings
from memplan.train.adapter_file import AdapterFile
from memplan.train.grown_files import read_header
from memplan.train.meta_model import as_transformers
from memplan.train.stream import Target, find_files, find_targets
from memplan.train.tokens import Tokenizer, first_line, load_tokenizer, model_folder

_DTYPES = ("F32", "F16", "BF16")
"""As safetensors files call them."""


def model_source(name: str) -> str:
    """A model as transformers finds it: local folder or hub id."""
    folder = model_folder(name, None)
    if folder is not None:
        return str(folder)
    return find_hub_id(name) or name


def base_files(name: str) -> list[Path]:
    try:
        files = find_files(model_source(name))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the weights of `{name}` cannot be found: {first_line(error)}",
            hint="name a local folder with the weights: `--base FOLDER`",
        ) from error
    if not files:
        raise ModelError(
            f"`{name}` has no safetensors files",
            hint="save it with transformers' `save_pretrained` first, and name that folder with `--base`",
        )
    return files


@dataclass(frozen=True)
class Edit:
    """A tensor of a file that gets what the adapter of `layer` adds."""

    layer: str
    is_transposed: bool


@dataclass(frozen=True)
class Plan:
    """What is done to the files of the base."""

    edits: dict[Path, dict[str, Edit]]
    """What is added to, by file and tensor."""
    vocabulary: dict[Path, dict[str, str]]
    """Tensors with a row for every token, and the module that the adapter knows each by."""
    num_rows: int
    grows: bool
    """Whether these tensors have fewer rows in the base."""
    tokenizer: Tokenizer | None
    """With the tokens that the run has added; None where it has added none."""
    whole: Whole


@dataclass(frozen=True)
class Whole:
    """What `modules_to_save` does to the files."""

    replaced: dict[Path, dict[str, str]] = field(default_factory=dict)
    """Names in the adapter of what takes the place of tensors, by file and tensor."""
    added: dict[Path, dict[str, str]] = field(default_factory=dict)
    """Tensors that the file has not, and those that they have been tied to."""
    is_untied: bool = False
    """Whether embeddings and head were one tensor and are no more, as peft's `merge_and_unload` leaves them."""


def plan_merge(adapter: AdapterFile, name: str, files: list[Path], job: Job | None) -> Plan:
    model = _meta_model(name)
    targets = {target.name: target for target in find_targets(model, model.state_dict().keys(), files)}
    edits = _plan_edits(adapter, name, model, targets)
    before = int(model.get_input_embeddings().weight.shape[0])
    num_rows, tokenizer = before, None
    if job is not None and job.data.special_tokens:
        tokenizer = load_tokenizer(
            model_source(name),
            model_folder(name, None),
            weights="pretrained",
            vocab_size=before,
            chat_template=job.data.chat_template,
            special_tokens=job.data.special_tokens,
        )
        num_rows = num_embeddings(job, before, tokenizer.size, tokenizer.num_new)
    highest = max((max(adapter.token_ids(module)) for module in adapter.modules_with_rows), default=-1)
    of_tokens = _token_tensors(model)
    copied = max((shape[0] for key, shape in adapter.whole.items() if key in of_tokens), default=0)
    num_rows = max(num_rows, highest + 1, copied)
    whole = _plan_whole(adapter, name, model, targets, num_rows)
    if num_rows == before and not adapter.modules_with_rows:
        return Plan(edits, {}, num_rows, grows=False, tokenizer=tokenizer, whole=whole)
    vocabulary = _vocabulary(model, targets)
    missing = set(adapter.modules_with_rows) - {
        module for found in vocabulary.values() for module in found.values()
    }
    if missing:
        raise ModelError(
            f"the adapter has rows of `{min(missing)}`, and `{name}` has no such embeddings or head",
            hint="name the model that it was trained beside with `--base`",
        )
    return Plan(edits, vocabulary, num_rows, grows=num_rows > before, tokenizer=tokenizer, whole=whole)


def _token_tensors(model: Any) -> list[str]:
    """Names of the tensors that have a row for every token, that of the embeddings first."""
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [f"{names[module]}.{key}" for module in (embeddings, head) for key in module._parameters]


def _plan_whole(
    adapter: AdapterFile, name: str, model: Any, targets: dict[str, Target], num_rows: int
) -> Whole:
    """Where the tensors of `modules_to_save` go; a head that shares its weight with the embeddings gets its own."""
    saved = tuple(adapter.config.get("modules_to_save") or ())
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for key in tensors:
        if matches(saved, key.rpartition(".")[0]) and key not in adapter.whole:
            raise RunError(
                f"the adapter names `modules_to_save` and lacks `{key}`",
                hint="save it again with the peft that made it",
            )
    if not adapter.whole:
        return Whole()
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    of_tokens = _token_tensors(model)
    shapes |= {key: (num_rows, *shapes[key][1:]) for key in of_tokens if key in shapes}
    for key, shape in adapter.whole.items():
        if shape != shapes.get(key):
            has = f"is {shapes[key]} there" if key in shapes else "is not there"
            raise ModelError(
                f"the adapter has `{key}` of {shape} for `{name}`, and it {has}",
                hint="name the model that it was trained beside with `--base`",
            )
    first = tensors[of_tokens[0]]
    tied = [key for key in of_tokens if tensors.get(key) is first]
    is_untied = len(tied) > 1 and any(key in adapter.whole for key in tied)
    replaced: dict[Path, dict[str, str]] = {}
    added: dict[Path, dict[str, str]] = {}
    for key in dict.fromkeys([*adapter.whole, *(tied if is_untied else ())]):
        there = key if key in targets else next((twin for twin in tied if twin in targets), key)
        target = targets.get(there)
        if target is None or target.converter is not None or len(target.sources) > 1:
            raise RunError(
                f"the files of the base hold `{key}` in another layout than the model",
                hint="save the base with transformers' `save_pretrained` first, or merge with peft",
            )
        source = target.sources[0]
        held = source.name
        dtype = read_header(source.file)[0][held]["dtype"]
        if dtype not in _DTYPES:
            raise ModelError(
                f"`{held}` is stored as {dtype}", hint="name the model in full precision with `--base`"
            )
        if there != key:
            added.setdefault(source.file, {})[key] = source.name
            held = key
        if key in adapter.whole:
            replaced.setdefault(source.file, {})[held] = key
    return Whole(replaced, added, is_untied)


def _vocabulary(model: Any, targets: dict[str, Target]) -> dict[Path, dict[str, str]]:
    """Tensors of the files that have a row for every token, and the modules whose rows they get."""
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    found: dict[Path, dict[str, str]] = {}
    for module in dict.fromkeys((embeddings, head)):
        for attribute, tensor in module.named_parameters(recurse=False):
            target = targets.get(f"{names[module]}.{attribute}")
            if target is not None:
                source = target.sources[-1]
                is_tied = tensor is embeddings.weight
                owner = names[embeddings if is_tied else module] if attribute == "weight" else attribute
                found.setdefault(source.file, {})[source.name] = owner
    return found


def _plan_edits(
    adapter: AdapterFile, name: str, model: Any, targets: dict[str, Target]
) -> dict[Path, dict[str, Edit]]:
    """What is added to, by file and tensor."""
    modules = dict(model.named_modules())
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    edits: dict[Path, dict[str, Edit]] = {}
    for layer in adapter.layers:
        module, target = modules.get(layer), targets.get(f"{layer}.weight")
        if f"{layer}.weight" in tied:
            raise RunError(
                f"`{layer}` shares its weight with the embeddings, so that an adapter beside it cannot be merged",
                hint="keep the adapter, or train without it",
            )
        if module is None or target is None or not hasattr(module, "weight"):
            raise ModelError(
                f"the adapter has a layer `{layer}`, and `{name}` has none of that name",
                hint="name the model that it was trained beside with `--base`",
            )
        if target.converter is not None or len(target.sources) > 1:
            raise RunError(
                f"the files of the base hold `{layer}` in another layout than the model",
                hint="save the base with transformers' `save_pretrained` first, or merge with peft",
            )
        source = target.sources[0]
        # transformers' Conv1D keeps its weight the other way round.
        edits.setdefault(source.file, {})[source.name] = Edit(layer, not isinstance(module, nn.Linear))
    return edits


def _meta_model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    config = resolve_config(name).config
    if config.get("quantization_config"):
        raise ModelError(
            f"the weights of `{name}` are quantised, and adapters are added to whole numbers of 16 or 32 bits",
            hint="name the model in full precision with `--base`",
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(as_transformers(config))
