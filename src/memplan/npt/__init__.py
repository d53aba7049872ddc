"""
Neuro-Plastic Transformer: blocks whose attention output modulates the first matrix of their MLP, token by
token.

* `layers.py`      which blocks (no torch; the planner reads it too)
* `modulator.py`   the trainable tensors A and B, and the weight delta that they make of an attention output
* `block.py`       the converted block: its three modes, and the order of allocations of local training
* `loss.py`        the equivalence loss
* `conversion.py`  a transformers model into one with NPT blocks; modes and metrics of its blocks
* `curriculum.py`  whose hidden states blocks train on, step by step (no torch)
* `distillation.py`  end-to-end equivalence: the loss on last hidden states
* `divergence.py`  the loss on predictions, a few tokens at a time
* `checkpoint.py`  the NPT tensors to a file and back

The names below are loaded on first use, so that importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.exports import lazy_exports
from memplan.npt.layers import layer_indices

if TYPE_CHECKING:
    from memplan.npt.block import NptBlock
    from memplan.npt.checkpoint import load_npt, save_npt, saved_npt
    from memplan.npt.conversion import LocalMetrics, convert, local_loss, npt_blocks, read_metrics, set_mode
    from memplan.npt.distillation import end_to_end

__all__ = [
    "LocalMetrics",
    "NptBlock",
    "convert",
    "end_to_end",
    "layer_indices",
    "load_npt",
    "local_loss",
    "npt_blocks",
    "read_metrics",
    "save_npt",
    "saved_npt",
    "set_mode",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "block": ("NptBlock",),
        "checkpoint": ("load_npt", "save_npt", "saved_npt"),
        "conversion": ("LocalMetrics", "convert", "local_loss", "npt_blocks", "read_metrics", "set_mode"),
        "distillation": ("end_to_end",),
    },
)
