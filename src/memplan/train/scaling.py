"""
Loss scaling for float16: gradients that would vanish in it are kept by a large factor on the loss, which is taken off
again before the optimizer steps. torch's GradScaler finds the factor: a step whose gradients overflow is left out and
halves it, and many steps without one double it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from memplan.errors import RunError
from memplan.job.spec import Job

FILE = "loss_scale.json"
SMALLEST_SCALE = 2.0**-10
"""Below this the gradients are not too large for float16: they are no numbers."""


class LossScale:
    """
    The scale of a run; 1 for good where nothing is computed in float16, and where adapters are float16 themselves:
    torch does not unscale their gradients.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        # Tensors without memory (tracing) have no values that could overflow.
        is_scaled = job.method != "npt" and not job.has_float16_adapters
        needed = is_scaled and "float16" in (job.autocast, job.dtype) and device.type != "meta"
        self._scaler = torch.amp.GradScaler(device.type, enabled=needed)
        if needed:
            # The scaler makes its tensors the first time that it scales something.
            self._scaler.scale(torch.zeros((), device=device))

    def value(self) -> float:
        """
        The factor for the losses of the next step, a power of two.

        Raises:
            RunError: the gradients of every step before overflowed.
        """
        scale = self._scaler.get_scale()
        if scale < SMALLEST_SCALE:
            raise RunError(
                f"the gradients overflow in float16 however the loss is scaled (by {scale:g} at last)",
                hint="use bfloat16, or lower `train.learning_rate`",
            )
        return scale

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the factor off the gradients, for clipping."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step if the gradients are finite, and find the next factor."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def save(self, folder: Path) -> None:
        """Write the state of the search into a checkpoint; nothing where there is no scale."""
        if self._scaler.is_enabled():
            (folder / FILE).write_text(json.dumps(self._scaler.state_dict()) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Continue the search of a checkpoint."""
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
