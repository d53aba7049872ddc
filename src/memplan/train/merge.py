"""
`memplan merge`: adds LoRA adapters to the weights they were trained beside; what was trained whole takes their places.

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

from torch import Tensor

from memplan.errors import ModelError, RunError
from memplan.job.spec import Job
from memplan.train.adapter_file import CONFIG, AdapterFile, read_adapter
from memplan.train.grown_files import (
    as_bytes,
    copy_grown,
    read_header,
    tensor_offsets,
    write_rows,
    write_whole,
)
from memplan.train.merge_plan import Edit, Plan, base_files, model_source, plan_merge
from memplan.train.output_folder import CHECKPOINTS, FINAL, JOB_FILE, read_job
from memplan.train.report import resume_command
from memplan.train.stream import INDEX

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
    num_replaced: int = 0
    """Tensors that were trained whole and have taken the places of those of the base."""
    is_untied: bool = False
    """The head has a weight of its own now."""


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
    files = base_files(name)
    plan = plan_merge(adapter, name, files, job)
    _check_disk(files, output, plan)
    unfinished = output.absolute().with_name(f"{_UNFINISHED}{output.absolute().name}")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for number, file in enumerate(files, 1):
            say(f"merging file {number} of {len(files)}: {file.name}")
            grown = {tensor: plan.num_rows for tensor in plan.vocabulary.get(file, ()) if plan.grows}
            copy_grown(file, unfinished / file.name, grown, plan.whole.added.get(file))
            _write_over(unfinished / file.name, plan.edits.get(file, {}), adapter)
            for tensor, module in plan.vocabulary.get(file, {}).items():
                if module in adapter.modules_with_rows:
                    write_rows(
                        unfinished / file.name, tensor, adapter.token_ids(module), adapter.token_rows(module)
                    )
            for tensor, key in plan.whole.replaced.get(file, {}).items():
                write_whole(unfinished / file.name, tensor, adapter.whole_tensor(key))
        _copy_beside(name, folder, unfinished)
        if plan.tokenizer is not None and plan.tokenizer.save is not None:
            plan.tokenizer.save(unfinished)
        if plan.grows or plan.whole.is_untied:
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
    return Merged(
        output, name, len(adapter.layers), len(files), was_quantized, len(adapter.whole), plan.whole.is_untied
    )


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


def _write_sizes(output: Path, plan: Plan) -> None:
    """The config and the index as the embeddings have it that have grown or are no head any more."""
    path = output / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if plan.grows:
        config["vocab_size"] = plan.num_rows
    if plan.whole.is_untied:
        config["tie_word_embeddings"] = False
        if "tie_word_embeddings" in config.get("text_config", {}):
            config["text_config"]["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = output / INDEX
    if index.is_file():
        fields = json.loads(index.read_text(encoding="utf-8"))
        fields.setdefault("metadata", {})["total_size"] = sum(
            file.stat().st_size - read_header(file)[1] for file in output.glob("*.safetensors")
        )
        for file, names in plan.whole.added.items():
            fields["weight_map"].update(dict.fromkeys(names, file.name))
        index.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _check_disk(files: list[Path], output: Path, plan: Plan) -> None:
    needed = sum(file.stat().st_size for file in files)
    for file, added in plan.whole.added.items():
        header, _ = read_header(file)
        for twin in added.values():
            first, last = header[twin]["data_offsets"]
            needed += last - first
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
            model_source(name), file_name,
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
    if merged.num_replaced:
        own = ", and the head has a weight of its own now" if merged.is_untied else ""
        lines.append(f"{merged.num_replaced} tensors that were trained whole are in it{own}")
    if merged.was_quantized:
        lines.append(
            "note: the adapters were trained beside a quantised base and are now in the one in full precision, "
            "whose outputs differ a little"
        )
    return lines
