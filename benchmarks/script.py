"""A training step that a source measured in a script of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class Script(NamedTuple):
    """A step, and what it trains."""

    step: Callable[[], None]
    models: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer | None = None
