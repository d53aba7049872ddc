"""The phases of a step that nobody marks: where backward and the optimizers begin is seen from torch itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from memplan.tracing.recorder import Recorder
from memplan.tracing.replaced import replaced


class StepPhases:
    """
    Marks phases in a recorder. Forward begins with the step and with a module's call behind a backward pass, backward
    with the outermost call of autograd's engine, the optimizer's step with the first clipping or stepping.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.step = 0
        self.num_optimizer_steps = 0
        self._phase = "load"
        self._depth = 0

    def begin_step(self) -> None:
        self.step += 1
        self._begin("forward", anew=True)

    def _begin(self, phase: str, *, anew: bool = False) -> None:
        if anew or phase != self._phase:
            self._phase = phase
            self.recorder.mark(phase, self.step)

    def _before_module(self, *_: Any) -> None:
        if not self._depth and self.step:
            self._begin("forward")

    def _before_optimizer(self, *_: Any) -> None:
        if self.step:
            self.num_optimizer_steps += 1
            self._begin("optimizer_step")

    def _engine(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def run_backward(*arguments: Any, **options: Any) -> Any:
            if not self._depth:
                self._begin("backward")
            self._depth += 1
            try:
                return run(*arguments, **options)
            finally:
                self._depth -= 1

        return run_backward

    def _clipping(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        def clipping(*arguments: Any, **options: Any) -> Any:
            self._begin("optimizer_step")
            return clip(*arguments, **options)

        return clipping

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Within, phases are marked."""
        import torch.nn.utils as utils

        clips = [name for name in ("clip_grad_norm_", "clip_grad_value_") if hasattr(utils, name)]
        changes = [
            (torch.autograd, "_engine_run_backward", self._engine(torch.autograd._engine_run_backward))
        ]
        changes += [(utils, name, self._clipping(getattr(utils, name))) for name in clips]
        hooks = [
            register_module_forward_pre_hook(self._before_module),
            register_optimizer_step_pre_hook(self._before_optimizer),
        ]
        try:
            with replaced(changes):
                yield
        finally:
            for hook in hooks:
                hook.remove()
