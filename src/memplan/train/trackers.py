"""Numbers of a run to TensorBoard or Weights & Biases, where the job asks for it; `metrics.jsonl` is written anyway."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""What `train.report_to` takes, and the package that it needs."""


class Tracker(Protocol):
    """Where the numbers of a step go."""

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""

    def close(self) -> None:
        """No more lines will come."""


def open_tracker(name: str, folder: Path, job: Mapping[str, Any], *, resumed_from: int) -> Tracker:
    """
    The tracker of a run in `folder`.

    Args:
        name: as `train.report_to`.
        job: what is noted down as the run's configuration.
        resumed_from: what was reported of later steps is taken back, where that can be done.
    """
    if name == "tensorboard":
        return TensorBoard(folder, resumed_from)
    return WeightsAndBiases(folder, job) if name == "wandb" else Nothing()


class Nothing:
    """`train.report_to: none`"""

    def log(self, line: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TensorBoard:
    """Scalars in `tensorboard/` of the run's folder."""

    def __init__(self, folder: Path, resumed_from: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_from + 1)

    def log(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(f"train/{name}", value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, under the name of the run's folder; where it goes is wandb's own configuration."""

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        import wandb

        run_id = hashlib.sha256(str(folder).encode()).hexdigest()[:16]  # the same when the run is resumed
        self._run = wandb.init(dir=str(folder), name=folder.name, id=run_id, config=dict(job), resume="allow")

    def log(self, line: Mapping[str, Any]) -> None:
        self._run.log(scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """
    The numbers of a line but its step; those of layers by layer.

    >>> scalars({"step": 3, "loss": 1.5, "relative_error": {"0": 0.25}})
    {'loss': 1.5, 'relative_error/0': 0.25}
    """
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": number for key, number in value.items()}
        elif name != "step":
            found[name] = value
    return found
