"""The batches of a loop: what of a micro batch is on the device, and what transformers' Trainer counts in it."""

from __future__ import annotations

from math import prod

from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.tape.behaviour import Behaviour
from memplan.tape.graph import Graph
from memplan.tape.programs import Settings
from memplan.tape.scratch import cast_to_sum
from memplan.tape.tensors import Tensor


class Batches:
    """Micro batches, one at a time or all of a step ahead."""

    def __init__(
        self, g: Graph, job: Job, architecture: Architecture, behaviour: Behaviour, settings: Settings
    ) -> None:
        self.g = g
        self.job = job
        self.architecture = architecture
        self.behaviour = behaviour
        self.settings = settings
        """Whose `position_ids` are those of the current one."""
        self.packed = job.packing and job.loop == "memplan"
        self.current: tuple[Tensor, ...] = ()
        """Token ids first, labels last."""
        self.ahead: list[tuple[Tensor, ...]] = []
        self.num_tokens: Tensor | None = None

    def drop(self) -> None:
        """The loop lets go of it."""
        self.current, self.settings.position_ids = (), None

    def load(self, micro: int, length: int) -> None:
        """Micro batch number `micro` of a step takes the place of the one before."""
        if not self.behaviour.prefetch:
            self.current = self.new(length)
            return
        if micro == 1:
            self.settings.position_ids = None  # which the batches hold
            batches = [self.new(length) for _ in range(self.job.gradient_accumulation_steps)]
            tokens = self._count_tokens([labels for *_, labels in batches])
            self.ahead = batches
            self.num_tokens = tokens
        self.current = self.ahead[micro - 1]
        if self.job.padding_free:
            self.settings.position_ids = self.current[1]

    def _count_tokens(self, batches: list[Tensor]) -> Tensor | None:
        """
        The Trainer counts the labels of a step, in the batches as they are (trainer.py, _get_num_items_in_batch): from
        the second position on where transformers knows by the model's class that its loss shifts them.
        """
        g, architecture = self.g, self.architecture
        shifts = not architecture.is_encoder and architecture.family != "gpt2"  # GPT2LMHeadModel
        total: Tensor | None = None
        for labels in batches:
            rows, length = labels.shape
            counted = g.new((rows, length - shifts), "bool", "targets", "inputs")
            if not self.behaviour.trainer_scalars:
                g.scratch(*cast_to_sum(prod(counted.shape)), name="sum")
                del counted
                continue
            tokens = g.new((), "int64", "targets of a batch", "inputs")
            g.scratch(*cast_to_sum(prod(counted.shape)), name="sum")
            del counted
            total = g.new((), "int64", "targets so far", "inputs")
            del tokens
        if total is None or not self.behaviour.divides_tokens:
            return total
        return g.new((), "float32", "targets of a step", "inputs")

    def new(self, length: int) -> tuple[Tensor, ...]:
        """Ids on the device, the collator's mask or the positions where rows are packed, and last the labels."""
        g, job = self.g, self.job
        shape = (job.micro_batch_size, length)
        if job.padding_free:
            return self._row(prod(shape))
        if self.packed and job.attention == "flash_attention_2":
            shape = (1, prod(shape))  # the trainer hands it all documents in one row (train/data.py, flatten)
        ids = g.new(shape, "int64", "input ids", "inputs")
        if self.behaviour.mask_in_batch:
            mask = g.new(shape, "int64", "attention mask", "inputs")
            return ids, mask, g.new(shape, "int64", "labels", "inputs")
        labels = g.new(shape, "int64", "labels", "inputs")
        if self.packed:
            self.settings.position_ids = g.new(shape, "int64", "position ids", "inputs")
        return ids, labels

    def _row(self, length: int) -> tuple[Tensor, ...]:
        """
        A micro batch as one row with positions, as transformers' DataCollatorWithFlattening makes it; TRL's has the
        beginnings of its documents besides, twice, and every token's document, in int32.
        """
        g, shape = self.g, (1, length)
        ids = g.new(shape, "int64", "input ids", "inputs")
        labels = g.new(shape, "int64", "labels", "inputs")
        positions = g.new(shape, "int64", "position ids", "inputs")
        if not self.behaviour.starts_in_batch:
            return ids, positions, labels
        starts = [
            g.new((self.job.micro_batch_size + 1,), "int32", "beginnings of documents", "inputs")
            for _ in range(2)
        ]
        return ids, positions, *starts, g.new(shape, "int32", "documents", "inputs"), labels
