"""Where a job comes from: a path, a ready job's name, a model, or standard input; and its text."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeGuard

from memplan.errors import JobError
from memplan.job.problems import shorten
from memplan.job.ready import find_ready_job, nearest_job

_SUFFIXES = (".yaml", ".yml", ".json", ".toml")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.yaml)(?<!\.yml)(?<!\.json)(?<!\.toml)", re.IGNORECASE)
"""An owner and a name, and no suffix of a job file."""
_MAX_BYTES = 1 << 20
"""A job file is a page of text; anything beyond this is a model or data file given by mistake."""


class Source(NamedTuple):
    """The text of a job, and what to call it."""

    text: str
    name: str
    """For messages, e.g. `` `job.yaml` ``."""
    suffix: str
    path: Path | None
    base_dir: Path
    """For relative data paths: the file's folder; the current one for a ready job and for `-`."""


def read_source(source: str | Path) -> Source:
    """
    The job that `source` names.

    A `Path`, and text that looks like one (a slash, a leading dot, a suffix of ours), is a path. Other text
    is a file of that name in the current directory, or else a ready job. What is neither, but names a model (one of the
    catalogue, a hub id, a folder with a config.json or that file), is a job that says nothing else. `-` is YAML on
    standard input.

    Raises:
        JobError: there is no such job, or its text cannot be read.
    """
    if source == "-":
        return Source(
            _decode(sys.stdin.buffer.read(), "standard input"), "standard input", "", None, Path.cwd()
        )
    path = expand_user(source)
    kind = "job file, ready job or model" if _is_name(source) else "job file"
    with _refusals(path, kind, lambda: _hint(source, path)):
        ready = find_ready_job(source) if _is_name(source) and not path.is_file() else None
        if ready is not None:
            return Source(_read(ready), f"the ready job `{source}`", ".yaml", ready, Path.cwd())
        if _is_model(source, path):
            quoted = source.replace("'", "''")
            return Source(f"model: '{quoted}'", f"the model `{source}`", ".yaml", None, Path.cwd())
        return _source_at(path)


def read_settings(text: str) -> Source:
    """
    A file of settings beside the job.

    Raises:
        JobError: there is no such file, or its text cannot be read.
    """
    path = expand_user(text)
    with _refusals(path, "file", lambda: "check the path"):
        return _source_at(path)


def _source_at(path: Path) -> Source:
    return Source(_read(path), f"`{path}`", path.suffix.lower(), path, path.absolute().parent)


@contextmanager
def _refusals(path: Path, kind: str, hint: Callable[[], str]) -> Iterator[None]:
    """What the system says against reading a file, as errors with a remedy."""
    try:
        yield
    except FileNotFoundError:
        raise JobError(f"there is no {kind} `{path}`", hint=hint()) from None
    except PermissionError:
        raise JobError(f"`{path}` may not be read", hint=f"check its permissions: `ls -l {path}`") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise JobError(f"`{shorten(path)}` cannot be read: {reason}", hint="check the path") from None


def expand_user(text: str | Path) -> Path:
    """A path with `~` replaced; as it is where there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _is_name(source: str | Path) -> TypeGuard[str]:
    return (
        isinstance(source, str)
        and not source.startswith((".", "~"))
        and not any(separator in source for separator in ("/", "\\"))
        and not source.lower().endswith(_SUFFIXES)
    )


def _is_model(source: str | Path, path: Path) -> TypeGuard[str]:
    """A `Path` never is one, and what begins with a folder that is here is a path."""
    from memplan.model.catalogue import find_model  # only where there is no ready job

    if not isinstance(source, str):
        return False
    if path.exists():
        return path.name == "config.json" or (path / "config.json").is_file()
    is_hub_id = _HUB_ID.fullmatch(source) is not None and not path.parent.exists()
    return is_hub_id or find_model(source) is not None


def _read(path: Path) -> str:
    if path.is_dir():
        raise JobError(
            f"`{path}` is a folder, not a job file", hint=f"name a file in it, e.g. `{path}/job.yaml`"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise JobError(
            f"`{path}` is larger than a job file can be (1 MiB)",
            hint="name the YAML file that describes the job, not the model or the data",
        )
    return _decode(path.read_bytes(), f"`{path}`")


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JobError(
            f"{name} line {line} is not UTF-8 text",
            hint="save the file as UTF-8; a job is a YAML, JSON or TOML file",
        ) from None


def _hint(source: str | Path, path: Path) -> str:
    from memplan.model.catalogue import nearest_models  # only where a job was not found

    stem = path.stem if path.suffix.lower() in _SUFFIXES else path.name
    if find_ready_job(stem):
        return f"did you mean the ready job `{stem}`?"
    nearest = [name for name in (nearest_job(stem), *nearest_models(stem, 2)) if name]
    if nearest:
        names = " or ".join(f"`{name}`" for name in nearest)
        return f"did you mean {names}? `memplan jobs` and `memplan models` list the names"
    return "check the path; `memplan jobs` and `memplan models` list the names"
