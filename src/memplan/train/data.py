"""Samples to micro batches, in an order that is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memplan.job.spec import Job
from memplan.train.order import Permutation
from memplan.train.samples import ID_BITS, START, Samples

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
PAD_ID = 0
"""Any id will do: no loss is taken on padding, and causal attention never looks right."""


@dataclass(frozen=True)
class MicroBatch:
    """
    One forward pass: `input_ids` and `labels`, both (batch, seq) int64 on the host.

    Short samples are padded on the right up to the longest of the batch. `labels` are the ids again,
    `IGNORE_INDEX` where no loss is taken; the loss shifts them. There is no attention mask: see `PAD_ID`.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    """(batch, seq) int64 with packing: from 0 in every document, which is how attention tells them apart."""
    token_mask: Tensor | None = None
    """(batch, seq) bool, True for tokens that are no padding; None if none are."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        tensors = (self.input_ids, self.labels, self.position_ids, self.token_mask)
        return MicroBatch(*(None if tensor is None else tensor.to(device) for tensor in tensors))


class Batches:
    """
    Which samples each step sees: the same for the same seed, whenever and wherever it is asked. Steps count
    from 1.

    Args:
        packing: samples hold several documents, each with positions of its own.
        flatten: all samples of a micro batch in one row, as varlen kernels want packed documents.
        longest_first: the longest sample is in the last micro batch of step 1, which is padded up to it, and the second
            longest in that of step 2, when the optimizer's states are there too: a run that cannot fit fails at once.
    """

    def __init__(
        self,
        samples: Samples,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        seed: int,
        *,
        packing: bool = False,
        flatten: bool = False,
        longest_first: bool = True,
    ) -> None:
        self.samples = samples
        self.micro_batch_size = micro_batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.seed = seed
        self.packing = packing
        self.flatten = flatten
        self._order: tuple[int, Permutation] = (-1, Permutation(1, ""))
        self._moved = self._longest_first() if longest_first else {}

    def _longest_first(self) -> dict[int, int]:
        """
        {position: sample} where the first pass differs from its shuffle: the longest sample is the last of step 1, the
        second longest that of step 2.

        The last sample of a step is in its last micro batch, when gradients of the others are held, however the global
        batch is divided: a run may be resumed with another micro batch.
        """
        order = Permutation(len(self.samples), f"{self.seed}/0")
        size = self.micro_batch_size * self.gradient_accumulation_steps
        moved: dict[int, int] = {}
        for position, sample in zip((size - 1, 2 * size - 1), self.samples.longest(2)):
            if position < len(self.samples):
                there = next((place for place, other in moved.items() if other == sample), None)
                there = order.position(sample) if there is None else there
                moved[there] = moved.get(position, order[position])
                moved[position] = sample
        return moved

    def sample_at(self, position: int) -> int:
        """The sample at a position of the endless sequence of shuffled passes over the data."""
        epoch, offset = divmod(position, len(self.samples))
        if epoch == 0 and offset in self._moved:
            return self._moved[offset]
        if self._order[0] != epoch:
            self._order = (epoch, Permutation(len(self.samples), f"{self.seed}/{epoch}"))
        return self._order[1][offset]

    def sample_indices(self, step: int) -> list[int]:
        """Samples of an optimizer step, over all its micro batches; epochs follow one another."""
        size = self.micro_batch_size * self.gradient_accumulation_steps
        return [self.sample_at(position) for position in range((step - 1) * size, step * size)]

    def num_targets(self, step: int) -> int:
        """Tokens that the loss of a step is taken over."""
        return sum(self.samples.targets[index] for index in self.sample_indices(step))

    def lengths(self, step: int) -> list[list[int]]:
        """Tokens of every sequence of a step before padding, by micro batch."""
        return [
            [self.samples.length(index) for index in self._rows(step, micro)]
            for micro in range(self.gradient_accumulation_steps)
        ]

    def micro_batch(self, step: int, micro: int) -> MicroBatch:
        """The tensors of one micro batch (from 0) of a step."""
        return self._collate(self._rows(step, micro))

    def _collate(self, indices: Iterable[int]) -> MicroBatch:
        import torch

        rows = [torch.tensor(self.samples[index], dtype=torch.int64) for index in indices]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID | START)
        is_short = any(len(row) < padded.shape[1] for row in rows)
        lengths = torch.tensor([len(row) for row in rows])
        places = torch.arange(padded.shape[1])
        position_ids = None
        if self.packing:
            starts = torch.where(padded >= START, places, 0).cummax(dim=1).values
            position_ids = places - starts
        input_ids = padded & ID_BITS
        labels = torch.where(padded > ID_BITS, IGNORE_INDEX, input_ids)
        if self.flatten:
            input_ids, labels = input_ids.reshape(1, -1), labels.reshape(1, -1)
            position_ids = None if position_ids is None else position_ids.reshape(1, -1)
        return MicroBatch(input_ids, labels, position_ids, places < lengths[:, None] if is_short else None)

    def one_pass(self) -> Iterator[MicroBatch]:
        """Every sample once, in the order of the data: for evaluation."""
        count, size = len(self.samples), self.micro_batch_size
        for start in range(0, count, size):
            yield self._collate(range(start, min(start + size, count)))

    def _rows(self, step: int, micro: int) -> list[int]:
        start = micro * self.micro_batch_size
        return self.sample_indices(step)[start : start + self.micro_batch_size]


def job_batches(job: Job, samples: Samples) -> Batches:
    """The batches of a job, over all its ranks: the loop takes the micro batches of its own."""
    return Batches(
        samples,
        job.micro_batch_size,
        job.global_batch_size // job.micro_batch_size,
        job.train.seed,
        packing=job.packing,
        flatten=job.packing and job.attention == "flash_attention_2",
        longest_first=job.data.longest_first,
    )
