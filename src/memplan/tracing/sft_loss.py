"""Head and loss of TRL's SFTTrainer (TRL 1.16, trainer/sft_trainer.py) in a Trainer that is traced."""

from __future__ import annotations

from collections import defaultdict
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from memplan.errors import TraceError


def check_trl() -> None:
    """Raise TraceError where there is no TRL with the head and loss that are planned."""
    hint = 'use `--engine shape` where that plans the job, or pip install "trl>=1.16"'
    if find_spec("trl") is None:
        raise TraceError(
            "`loss: chunked` of `loop: hf_trainer` is that of TRL's SFTTrainer, which is not installed",
            hint=hint,
        )
    if not hasattr(import_module("trl.trainer.utils"), "add_fused_lm_head"):
        raise TraceError("the installed TRL has another head and loss than 1.16", hint=hint)


def sft_loss(kind: Any) -> Any:
    """A subclass of a Trainer's class with this head and loss."""
    from trl.trainer.sft_trainer import SFTTrainer
    from trl.trainer.utils import add_fused_lm_head

    class WithLoss(kind):
        compute_loss = SFTTrainer.compute_loss
        aux_loss_enabled = False
        _tp_size = 1

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.args.loss_type = "nll"
            self._metrics: dict[str, Any] = {"train": defaultdict(list)}
            self._total_train_tokens = 0
            base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))

    return WithLoss
