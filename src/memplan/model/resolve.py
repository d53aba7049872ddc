"""What a job names as its model to `Architecture`: a local config, the catalogue, the cache, or the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from memplan.errors import ModelError
from memplan.model.architecture import Architecture
from memplan.model.catalogue import find_model, nearest_models
from memplan.model.config import architecture_from_config
from memplan.model.hub import cached_config_path, fetch_config, is_offline, read_config

_BARE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class ResolvedConfig(NamedTuple):
    """A `config.json` and where it was read."""

    name: str
    """As the job names it."""
    config: dict[str, Any]
    source: str


def resolve_model(
    reference: str, *, base_dir: Path | None = None, offline: bool | None = None
) -> Architecture:
    """
    The architecture of the model that a job names.

    In this order: an existing config.json or a folder with one (relative to `base_dir`, else to the working
    directory), a catalogue entry by name or hub id, the local hub cache, the hub. Weights are never read.
    `offline=None` follows `HF_HUB_OFFLINE`. Raises `ModelError` when the config cannot be found or makes no
    sense, `UnknownModel` when the shape writer has no program for the architecture.
    """
    resolved = resolve_config(reference, base_dir=base_dir, offline=offline)
    return architecture_from_config(resolved.config, name=resolved.name, source=resolved.source)


def resolve_config(
    reference: str, *, base_dir: Path | None = None, offline: bool | None = None
) -> ResolvedConfig:
    """As `resolve_model`, up to the config: also for architectures that only the trace writer can plan."""
    if not reference.strip():
        raise ModelError(
            "No model is named", hint="Name a hub id, a local folder, or an entry of `memplan models`"
        )
    local = _local_config(reference, base_dir)
    if local is not None:
        return ResolvedConfig(reference, read_config(local), str(local))
    entry = find_model(reference)
    if entry is not None:
        return ResolvedConfig(reference, dict(entry.config), f"catalogue entry {entry.name}: {entry.source}")
    if _BARE_NAME.fullmatch(reference) or _HUB_ID.fullmatch(reference):
        cached = cached_config_path(reference)
        if cached is not None:
            return ResolvedConfig(reference, read_config(cached), str(cached))
    if not _HUB_ID.fullmatch(reference):
        raise ModelError(
            f"There is no model `{reference}`: no such file or folder, not in the catalogue, no hub id",
            hint=_spelling_hint(reference),
        )
    if is_offline() if offline is None else offline:
        raise ModelError(
            f"The config.json of {reference} is not in the catalogue or the local cache, and we are offline",
            hint=f"Name a local config.json. {_spelling_hint(reference)}",
        )
    try:
        config, address = fetch_config(reference)
    except ModelError as error:
        raise ModelError(error.message, hint=f"{error.hint}. {_spelling_hint(reference)}") from None
    return ResolvedConfig(reference, config, address)


def _local_config(reference: str, base_dir: Path | None) -> Path | None:
    """The config file that the reference names, None if it names none; `ModelError` if it must be a path."""
    try:
        path = Path(reference).expanduser()
    except RuntimeError:  # `~name` of nobody
        path = Path(reference)
    candidates = [(folder / path) for folder in (base_dir, Path.cwd()) if folder is not None]
    for candidate in candidates:
        if candidate.suffix == ".json" and _is_file(candidate):
            return candidate
        if _is_file(candidate / "config.json"):
            return candidate / "config.json"
        if _is_file(candidate / "adapter_config.json"):
            raise ModelError(
                f"{reference} holds an adapter (adapter_config.json) and no model",
                hint="Name the model that the adapter was made for: `base_model_name_or_path` in that file",
            )
    if reference.startswith((".", "/", "~")) or reference.endswith(".json") or _is_file(candidates[0]):
        raise ModelError(
            f"{reference} is not a config.json or a folder with one (looked at {candidates[0]})",
            hint="Name the folder that holds the model's config.json, or a hub id",
        )
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long to be one
        return False


def _spelling_hint(reference: str) -> str:
    nearest = nearest_models(reference)
    did_you_mean = f"Did you mean {' or '.join(f'`{name}`' for name in nearest)}? " if nearest else ""
    return f"{did_you_mean}`memplan models` lists those that need no network"
