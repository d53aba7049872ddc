"""transformers' Trainer, told to say when its phases begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def observed_trainer(begin: Callable[[str, int], None], end_step: Callable[[int], None]) -> type:
    """
    A Trainer that calls `begin(phase, step)` as forward, backward and the optimizer's step begin, and
    `end_step(step)` after each optimizer step (from 1). It logs nothing.
    """
    from transformers import Trainer, TrainerCallback

    class EndOfStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            end_step(state.global_step)

    class Observed(Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, callbacks=[EndOfStep()])
            self._has_begun = False
            backward = self.accelerator.backward

            def observed_backward(*positional: Any, **keywords: Any) -> None:
                begin("backward", self.state.global_step + 1)
                backward(*positional, **keywords)

            self.accelerator.backward = observed_backward

        def get_batch_samples(self, *positional: Any, **options: Any) -> Any:
            """All micro batches of a step go to the device before the first of them is used."""
            begin("forward", self.state.global_step + 1)
            self._has_begun = True
            return super().get_batch_samples(*positional, **options)

        def training_step(self, *positional: Any, **options: Any) -> Any:
            if not self._has_begun:
                begin("forward", self.state.global_step + 1)
            self._has_begun = False
            loss = super().training_step(*positional, **options)
            if self.accelerator.sync_gradients:
                begin("optimizer_step", self.state.global_step + 1)
            return loss

        def log(self, *positional: Any, **options: Any) -> None:
            """Of no use to anybody here."""

    return Observed


def flattened(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """As one row with positions, in which sequences begin anew, as transformers.DataCollatorWithFlattening makes it."""
    import torch

    ids = torch.tensor([[token for row in rows for token in row["input_ids"]]], dtype=torch.int64)
    positions = torch.tensor([[place for row in rows for place in range(len(row["input_ids"]))]])
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(positions == 0, -100),
        "position_ids": positions,
    }


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """
    Rows of one length as a batch of tensors, whose labels are its ids, with a mask of ones, as
    transformers.DataCollatorForLanguageModeling makes it of them.
    """
    import torch

    input_ids = torch.tensor([row["input_ids"] for row in rows], dtype=torch.int64)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.clone(),
    }
