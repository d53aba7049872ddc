"""Writing a job: YAML a person would write, which reads back as the same job."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memplan.errors import JobError
from memplan.job.data_names import BUILT_IN_DATA, PATH_FIELDS, is_hub_dataset
from memplan.job.fields import field_value, job_fields
from memplan.job.spec import Job

_ALWAYS = ("model", "method", "micro_batch_size", "gradient_accumulation_steps", "max_seq_len")
_WIDTH = 100
_PLAIN = re.compile(r"(?:[A-Za-z][A-Za-z0-9_./+-]*|/[A-Za-z0-9_./+-]+|\d+(?:\.\d+)?(?:%|[KMGT]?i?B))")
"""Text that every YAML reader takes for text, in flow style too."""
_RESERVED = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def dump_job(job: Job, *, origins: Mapping[str, str] | None = None) -> str:
    """
    A job as YAML: the basics, and whatever differs from memplan's defaults, in the order of the spec.

    Args:
        origins: as `LoadedJob.origins`; fields whose origin is not `memplan default` are written too, and
            those that another tool would have set silently are marked.
    """
    origins = origins or {}
    lines: list[str] = []
    for name, value in _tree(job, origins).items():
        if isinstance(value, dict):
            lines += _section(name, value, origins)
        else:
            lines.append(f"{name}: {_scalar(value)}{_mark(origins, name)}")
    return "\n".join(lines) + "\n"


def write_job(
    path: str | Path,
    job: Job,
    *,
    origins: Mapping[str, str] | None = None,
    overwrite: bool = False,
    base_dir: Path | None = None,
) -> None:
    """
    Write a job file, whole or not at all: JSON where the path says `.json`, YAML otherwise.

    Args:
        overwrite: replace a file that is there.
        base_dir: what the job's relative data paths are relative to; they are rewritten to hold from `path`.

    Raises:
        JobError: the file is there already, is TOML, or cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() == ".toml":
        raise JobError(f"`{path}`: memplan reads TOML but does not write it", hint="write `.yaml` or `.json`")
    if path.exists() and not overwrite:
        raise JobError(f"`{path}` exists already", hint="write to another name, or remove that file first")
    if base_dir is not None:
        job = _moved(job, base_dir, path.absolute().parent)
    if path.suffix.lower() == ".json":
        text = json.dumps(_tree(job, origins or {}), indent=2, ensure_ascii=False) + "\n"
    else:
        text = dump_job(job, origins=origins)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise JobError(
            f"`{path}` cannot be written: {error.strerror}",
            hint=f"check that the folder `{path.parent}` exists",
        ) from None


def _tree(job: Job, origins: Mapping[str, str]) -> dict[str, Any]:
    """The fields worth writing, {field: value} and {section: {field: value}}, in the order of the spec."""
    tree: dict[str, Any] = {}
    for name, field in job_fields().items():
        value = field_value(job, name)
        is_given = origins.get(name, "memplan default") != "memplan default"
        if name in _ALWAYS or is_given or value != field.default:
            section, _, rest = name.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[rest] = value
    return tree


def _section(name: str, inner: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    marked = any(_mark(origins, f"{name}.{key}") for key in inner)
    flow = f"{name}: {{{', '.join(f'{key}: {_scalar(value)}' for key, value in inner.items())}}}"
    if len(flow) <= _WIDTH and not marked:
        return [flow]
    lines = [f"  {key}: {_scalar(value)}{_mark(origins, f'{name}.{key}')}" for key, value in inner.items()]
    return [f"{name}:", *lines]


def _mark(origins: Mapping[str, str], name: str) -> str:
    return "  # tool default" if origins.get(name) == "tool default" else ""


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str) and not (_PLAIN.fullmatch(value) and value.lower() not in _RESERVED):
        return _quoted(value)
    return str(value)


def _float(value: float) -> str:
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    # YAML 1.1 takes `1e-05` for text; `1.0e-05` is a number to every reader.
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else text


def _quoted(text: str) -> str:
    import yaml

    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=2**31 - 1).rstrip("\n")


def _moved(job: Job, old: Path, new: Path) -> Job:
    changes: dict[str, Any] = {}
    for name in PATH_FIELDS:
        text = field_value(job, name)
        if text in (None, BUILT_IN_DATA) or text.startswith("~") or Path(text).is_absolute():
            continue
        if not is_hub_dataset(text, old / text):
            changes[name] = os.path.relpath(old / text, new)
    return job.replace(**changes) if changes and old.absolute() != new else job
