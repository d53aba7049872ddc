"""The cells of the matrix: which jobs are recorded, in which order. `matrix.yaml` says what its fields mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from memplan.job.load import LoadedJob, load_job
from memplan.model.resolve import resolve_config

FILE = Path(__file__).parent / "matrix.yaml"
_NUM_LAYERS = ("num_hidden_layers", "n_layer")
_PER_LAYER = ("layer_types", "mlp_layer_types")


@dataclass(frozen=True)
class Cell:
    """One job to record."""

    name: str
    loaded: LoadedJob
    model_config: dict[str, Any]
    steps: int
    limits: bool
    seconds: int
    """The longest that it may take."""


def load_matrix(file: Path = FILE) -> list[Cell]:
    """All cells in the order of the file; raises JobError, ModelError, ValueError where it is wrong."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    cells = [_cell(name, entry or {}, content) for name, entry in content["cells"].items()]
    if not cells:
        raise ValueError(f"{file.name} has no cells")
    return cells


def _cell(name: str, entry: dict[str, Any], content: dict[str, Any]) -> Cell:
    settings = {"steps": 3, "limits": False, "seconds": 90}
    job = {**content.get("defaults", {}), **entry}
    unchecked = job.pop("unchecked", {})
    for key, default in settings.items():
        settings[key] = type(default)(job.pop(key, default))
    loaded = load_job(None, flags=dict(_dotted(job)))
    loaded = loaded._replace(job=loaded.job.replace(**unchecked))
    return Cell(name, loaded, model_config(loaded.job.model, content.get("models", {})), **settings)


def model_config(model: str, models: dict[str, Any]) -> dict[str, Any]:
    """
    The config of a model of the matrix: `config` as it stands there, or that of the catalogue's entry `base`;
    with `layers`, cut to so many.
    """
    entry = models.get(model, {"base": model})
    config = entry.get("config") or resolve_config(entry["base"], offline=True).config
    return cut(config, entry["layers"]) if "layers" in entry else dict(config)


def cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A model's config with fewer layers, of the kinds of its first ones; raises ValueError for more layers."""
    cut_config = dict(config)
    names = [name for name in _NUM_LAYERS if name in config]
    if not names or config[names[0]] < layers:
        raise ValueError(f"a model of {config.get(names[0]) if names else 'unknown'} layers has no {layers}")
    for name in names:
        cut_config[name] = layers
    for name in _PER_LAYER:
        if isinstance(config.get(name), list):
            cut_config[name] = config[name][:layers]
    return cut_config


def _dotted(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in fields.items():
        if isinstance(value, dict):
            leaves += _dotted(value, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, value))
    return leaves
