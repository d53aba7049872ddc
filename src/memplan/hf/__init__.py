"""
transformers' Trainer: its arguments as a job has them, its phases, and a plan and a measurement of one's own runs.

* `MemplanCallback`: plans a Trainer's run before its first step, and compares with what was measured
* `preflight`: the plan of a Trainer, or of arguments and a model, without a run

Importing this imports no torch; the names above do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.exports import lazy_exports

if TYPE_CHECKING:
    from memplan.hf.callback import MemplanCallback as MemplanCallback
    from memplan.hf.plan import TrainerPlan as TrainerPlan
    from memplan.hf.plan import preflight as preflight

__getattr__ = lazy_exports(__name__, {"callback": ("MemplanCallback",), "plan": ("TrainerPlan", "preflight")})
