"""
`memplan merge`: adds LoRA adapters to the weights they were trained beside.

The files of the base are copied as they are, and every weight that has an adapter is written over in its copy: same
files, same order, same dtypes. At no time is more in RAM than the largest such weight, in float32, and what is added to
it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memplan.errors import ModelError, RunError
from memplan.job.spec import Job
from memplan.model import resolve_config
from memplan.model.catalogue import find_hub_id
from memplan.tape.vocabulary import num_embeddings
from memplan.train.adapter_file import CONFIG, AdapterFile, read_adapter
from memplan.train.grown_files import as_bytes, copy_grown, read_header, tensor_offsets, write_rows
from memplan.train.meta_model import as_transformers
from memplan.train.output_folder import CHECKPOINTS, FINAL, JOB_FILE, read_job
from memplan.train.report import resume_command
from memplan.train.stream import INDEX, Target, find_files, find_targets
from memplan.train.tokens import Tokenizer, first_line, load_tokenizer, model_folder

BESIDE_WEIGHTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", INDEX,
)  # fmt: skip
"""Files of a model that are taken along where it has them."""

_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Merged:
    """What was done."""

    output: Path
    base: str
    num_layers: int
    num_files: int
    was_quantized: bool
    """The adapters were trained beside a quantised base."""


def merge(
    source: Path, output: Path, *, base: str | None = None, say: Callable[[str], None] = lambda text: None
) -> Merged:
    """
    Write the base with the adapters of `source` added to it into `output`.

    Args:
        source: a run's folder, one of its checkpoints, or a folder that peft has saved an adapter in.
        output: a folder that does not exist or is empty.
        base: model to add them to; by default the one that they were trained beside.
        say: is told what is being done.

    Raises:
        RunError: there is no such adapter, it is none that can be merged, or the output cannot be written.
        ModelError: the weights of the base are not there, or have other layers.
        UnknownModel: the installed transformers has no such model.
    """
    _check_output(output)
    folder, job = _find_adapter(source)
    adapter = read_adapter(folder)
    name = base or _base_of(adapter, job)
    files = _files(name)
    plan = _plan(adapter, name, files, job)
    _check_disk(files, output)
    unfinished = output.absolute().with_name(f"{_UNFINISHED}{output.absolute().name}")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for number, file in enumerate(files, 1):
            say(f"merging file {number} of {len(files)}: {file.name}")
            grown = {tensor: plan.num_rows for tensor in plan.vocabulary.get(file, ()) if plan.grows}
            copy_grown(file, unfinished / file.name, grown)
            _write_over(unfinished / file.name, plan.edits.get(file, {}), adapter)
            for tensor, module in plan.vocabulary.get(file, {}).items():
                if module in adapter.modules_with_rows:
                    write_rows(
                        unfinished / file.name, tensor, adapter.token_ids(module), adapter.token_rows(module)
                    )
        _copy_beside(name, folder, unfinished)
        if plan.tokenizer is not None and plan.tokenizer.save is not None:
            plan.tokenizer.save(unfinished)
        if plan.grows:
            _write_sizes(unfinished, plan)
        unfinished.replace(output)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RunError(
            f"`{output}` cannot be written: {error.strerror or error}",
            hint="make room, or choose another `--output`",
        ) from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    was_quantized = job is not None and job.method == "qlora"
    return Merged(output, name, len(adapter.layers), len(files), was_quantized)


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"`{output}` is there already and not empty", hint="choose another `--output`")


def _find_adapter(source: Path) -> tuple[Path, Job | None]:
    """The folder with the adapter, and the job of the run that it is of."""
    folder = source / FINAL if (source / JOB_FILE).is_file() else source
    run = next(
        (path for path in (source, *source.absolute().parents[:2]) if (path / JOB_FILE).is_file()), None
    )
    job = read_job(run / JOB_FILE) if run is not None else None
    if job is not None and job.method == "npt":
        raise RunError(
            f"`{source}` is an NPT run, and there is nothing to merge: what its layers add to a weight depends on the "
            "token",
            hint="keep `npt.safetensors` beside the base",
        )
    if job is not None and job.method == "full":
        raise RunError(
            f"`{source}` is a run of the whole model, and there is nothing to merge",
            hint=f"`{folder}` is the model",
        )
    if (folder / CONFIG).is_file():
        return folder, job
    if folder != source:
        raise RunError(
            f"the run in `{source}` is not finished: it has no `{FINAL}`",
            hint=f"finish it with `{resume_command(source)}`, or name a checkpoint: `{source / CHECKPOINTS}/step-...`",
        )
    raise RunError(f"`{source}` holds neither a run nor an adapter", hint=f"name a folder with a `{CONFIG}`")


def _base_of(adapter: AdapterFile, job: Job | None) -> str:
    if job is not None:
        if job.weights == "random":
            raise RunError(
                "the adapters were trained beside random weights, which are nowhere on disk",
                hint="name weights with `--base`",
            )
        return job.model
    name = adapter.config.get("base_model_name_or_path")
    if not name:
        raise RunError(f"`{adapter.folder}` does not say what its base is", hint="name it with `--base`")
    return str(name)


def _source(name: str) -> str:
    """A model as transformers finds it: local folder or hub id."""
    folder = model_folder(name, None)
    if folder is not None:
        return str(folder)
    return find_hub_id(name) or name


def _files(name: str) -> list[Path]:
    try:
        files = find_files(_source(name))
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


def _plan(adapter: AdapterFile, name: str, files: list[Path], job: Job | None) -> Plan:
    model = _meta_model(name)
    targets = {target.name: target for target in find_targets(model, model.state_dict().keys(), files)}
    edits = _plan_edits(adapter, name, model, targets)
    before = int(model.get_input_embeddings().weight.shape[0])
    num_rows, tokenizer = before, None
    if job is not None and job.data.special_tokens:
        tokenizer = load_tokenizer(
            _source(name),
            model_folder(name, None),
            weights="pretrained",
            vocab_size=before,
            chat_template=job.data.chat_template,
            special_tokens=job.data.special_tokens,
        )
        num_rows = num_embeddings(job, before, tokenizer.size, tokenizer.num_new)
    highest = max((max(adapter.token_ids(module)) for module in adapter.modules_with_rows), default=-1)
    num_rows = max(num_rows, highest + 1)
    if num_rows == before and not adapter.modules_with_rows:
        return Plan(edits, {}, num_rows, grows=False, tokenizer=tokenizer)
    vocabulary = _vocabulary(model, targets)
    missing = set(adapter.modules_with_rows) - {
        module for found in vocabulary.values() for module in found.values()
    }
    if missing:
        raise ModelError(
            f"the adapter has rows of `{min(missing)}`, and `{name}` has no such embeddings or head",
            hint="name the model that it was trained beside with `--base`",
        )
    return Plan(edits, vocabulary, num_rows, grows=num_rows > before, tokenizer=tokenizer)


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


def _write_sizes(output: Path, plan: Plan) -> None:
    """The config and the index as the grown embeddings have it."""
    path = output / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "vocab_size": plan.num_rows}, indent=2) + "\n", encoding="utf-8")
    index = output / INDEX
    if index.is_file():
        fields = json.loads(index.read_text(encoding="utf-8"))
        fields.setdefault("metadata", {})["total_size"] = sum(
            file.stat().st_size - read_header(file)[1] for file in output.glob("*.safetensors")
        )
        index.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


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


@dataclass(frozen=True)
class Edit:
    """A tensor of a file that gets what the adapter of `layer` adds."""

    layer: str
    is_transposed: bool


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


def _check_disk(files: list[Path], output: Path) -> None:
    needed = sum(file.stat().st_size for file in files)
    there = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        from memplan.units import format_bytes

        raise RunError(
            f"the merged model takes {format_bytes(needed)}, and {format_bytes(free)} are free in `{there}`",
            hint="make room, or choose another `--output`",
        )


def _write_over(copy: Path, edits: dict[str, Edit], adapter: AdapterFile) -> None:
    """Write the merged tensors over theirs in the copy of a file; the header stays true."""
    from safetensors import safe_open

    if not edits:
        return
    offsets = tensor_offsets(copy)
    with safe_open(copy, framework="pt") as tensors, copy.open("r+b") as file:
        for name, edit in edits.items():
            merged = _merged(name, tensors.get_tensor(name), edit, adapter)
            file.seek(offsets[name])
            file.write(as_bytes(merged))
            del merged


def _merged(name: str, weight: Tensor, edit: Edit, adapter: AdapterFile) -> Tensor:
    """Added in float32 and rounded once."""
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ModelError(
            f"`{name}` is stored as {weight.dtype}".replace("torch.", ""),
            hint="name the model in full precision with `--base`",
        )
    delta = adapter.delta(edit.layer)
    if edit.is_transposed:
        delta = delta.T
    if delta.shape != weight.shape:
        raise ModelError(
            f"the adapter of `{edit.layer}` is for a weight of {tuple(delta.shape)}, and the base's is "
            f"{tuple(weight.shape)}",
            hint="name the model that it was trained beside with `--base`",
        )
    return weight.float().add_(delta).to(weight.dtype)


def _copy_beside(name: str, adapter_folder: Path, output: Path) -> None:
    """Config, index and tokenizer; a tokenizer that only the run has is taken from there."""
    from transformers.utils.hub import cached_file

    for file_name in BESIDE_WEIGHTS:
        found = cached_file(
            _source(name), file_name,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        own = adapter_folder / file_name
        if found is None and own.is_file():
            found = own
        if found is not None:
            shutil.copyfile(found, output / file_name)


def explain(merged: Merged) -> list[str]:
    """What a person should know of a merge."""
    lines = [f"merged {merged.num_layers} layers into `{merged.base}`: {merged.output}"]
    if merged.was_quantized:
        lines.append(
            "note: the adapters were trained beside a quantised base and are now in the one in full precision, "
            "whose outputs differ a little"
        )
    return lines
