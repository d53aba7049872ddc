"""What a traced step does not say of itself: its warnings."""

from __future__ import annotations

from torch import nn

from memplan.preflight.environment import installed_torch_version
from memplan.tape.backends import Target, beyond_plans
from memplan.tracing.recorder import Recorder
from memplan.tracing.step_phases import StepPhases


def notes_on_torch() -> tuple[str, ...]:
    """Where the torch that traces is later than the one that is planned for."""
    installed = installed_torch_version()
    beyond = beyond_plans(installed)
    return () if beyond is None else (f"traced with torch {installed}, {beyond} (docs/tracing.md, Versions)",)


def notes_on_models(models: dict[str, nn.Module], *, is_compiled: bool) -> list[str]:
    """Of modules that run otherwise on a GPU than they are traced."""
    modules = [module for model in models.values() for module in model.modules()]
    notes = []
    if is_compiled or any(hasattr(module, "_orig_mod") for module in modules):
        notes.append("torch.compile: traced as it runs without, which takes more as a rule")
    if any(isinstance(module, nn.RNNBase) for module in modules):
        notes.append(
            "recurrent layers are traced step by step: what cuDNN or oneDNN, which run them whole, hold is not known"
        )
    return notes


def notes_on_run(
    recorder: Recorder, target: Target, phases: StepPhases, steps: int, *, is_known: bool
) -> list[str]:
    """Of values that were asked for, workspaces and states that are not counted, and the target's own."""
    notes = list(target.notes(is_known=is_known))
    if recorder.unknown_values:
        notes.append(
            f"modules looked at {recorder.unknown_values} values that only real data has; they were told 1"
        )
    if recorder.unknown_outside:
        notes.append(
            f"the step itself looked at {recorder.unknown_outside} such values, as `loss.item()` does; it was told 1"
        )
    if target.device == "cuda" and "aten::convolution" in recorder.operations_seen():
        notes.append("cuDNN's workspaces for convolutions are not counted")
    if not phases.num_optimizer_steps:
        notes.append("no optimizer stepped, so its states are not counted")
    elif steps < 2:
        notes.append(
            "one step was traced: the optimizer's states appear at its end, so a second one takes more"
        )
    return notes
