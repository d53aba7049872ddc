"""
Documents to samples of token ids, kept in files and mapped into memory, so that RAM does not grow with the data.

A token is one int32: the id, and two flags above it. `MASKED`: no loss is taken on it. `START`: it is the first of
a document (or of the part of one that a sample holds), so that no loss is taken on it either, and with packing
positions count from it.
"""

from __future__ import annotations

import hashlib
import heapq
import mmap
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import DataError, RunError
from memplan.train.documents import Document

MASKED = 1 << 29
START = 1 << 30
ID_BITS = MASKED - 1
"""What is left of a token without its flags."""


@dataclass(frozen=True)
class Samples:
    """All samples, end to end: sample `i` is `tokens[offsets[i] : offsets[i + 1]]`."""

    tokens: Sequence[int]
    offsets: Sequence[int]
    targets: Sequence[int]
    """By sample: tokens that the loss is taken on."""
    digest: str
    """SHA-256 of every token and every boundary: equal only for equal data, tokenizer, template and cut."""
    num_truncated: int = 0
    """Rows that lost tokens because they were longer than `max_seq_len`."""
    num_empty: int = 0
    """Samples left out because nothing in them is trained on."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sequence[int]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def length(self, index: int) -> int:
        """Tokens of one sample."""
        return self.offsets[index + 1] - self.offsets[index]

    def longest(self, count: int) -> list[int]:
        """The `count` longest samples, the longest first, of equal ones the earlier first."""
        return heapq.nsmallest(count, range(len(self)), key=lambda index: (-self.length(index), index))


class SampleWriter:
    """
    Appends samples to three files without a name: they go with the process, however it ends.

    Args:
        folder: where the files live; None for the system's temporary folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._files: list[Any] = [tempfile.TemporaryFile(dir=folder) for _ in range(3)]  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._end = 0
        self.num_samples = 0
        self._write(1, array("q", [0]))

    def add(self, tokens: array[int]) -> None:
        """One sample, flags included."""
        self._end += len(tokens)
        self.num_samples += 1
        self._digest.update(tokens)
        self._digest.update(self._end.to_bytes(8, "little"))
        self._write(0, tokens)
        self._write(1, array("q", [self._end]))
        self._write(2, array("i", [count_targets(tokens)]))

    def finish(self, *, num_truncated: int = 0, num_empty: int = 0) -> Samples:
        """Everything added, mapped into memory; there must be at least one sample."""
        tokens, offsets, targets = (self._map(index, kind) for index, kind in enumerate(("i", "q", "i")))
        return Samples(tokens, offsets, targets, self._digest.hexdigest(), num_truncated, num_empty)

    def _write(self, index: int, values: array[int]) -> None:
        try:
            self._files[index].write(values)
        except OSError as error:
            raise RunError(
                f"the tokens cannot be written: {error.strerror}",
                hint="make room on the disk of the output folder",
            ) from error

    def _map(self, index: int, kind: Any) -> memoryview[int]:
        file = self._files[index]
        file.flush()
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast(kind)


def count_targets(tokens: Sequence[int]) -> int:
    """Tokens of a sample that the loss is taken on: all without a flag, which the first always has."""
    return sum(token < MASKED for token in tokens)


def build_samples(
    documents: Iterable[Document],
    tokenize: Callable[[Document], list[int]],
    *,
    max_seq_len: int,
    packing: bool,
    folder: Path | None = None,
) -> Samples:
    """
    Tokenise and cut documents. A sample has at most `max_seq_len` tokens, and something to learn.

    Args:
        tokenize: the ids of a document, `MASKED` on those that no loss is taken on.
        packing: fill samples to exactly `max_seq_len` with one document after the other; one that does not fit goes
            on in the next sample. What is left at the very end is dropped.
        folder: where the tokens are kept.

    Raises:
        DataError: no sample is left.
    """
    writer = SampleWriter(folder)
    cutter = _Packer(max_seq_len) if packing else _Cutter(max_seq_len)
    num_empty = 0
    for sample in cutter.samples(documents, tokenize):
        if count_targets(sample):
            writer.add(sample)
        else:
            num_empty += 1
    if not writer.num_samples:
        cause = "nothing to learn in any sample" if num_empty else "no sample of 2 tokens or more"
        raise DataError(
            f"the data holds {cause} (max_seq_len {max_seq_len})",
            hint="check `data.train`, `data.text` and `data.mask`",
        )
    return writer.finish(num_truncated=cutter.num_truncated, num_empty=num_empty)


class _Cutter:
    """Rows are truncated, texts are cut into consecutive samples."""

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        self.num_truncated = 0

    def samples(
        self, documents: Iterable[Document], tokenize: Callable[[Document], list[int]]
    ) -> Iterator[array[int]]:
        limit = self.max_seq_len
        rest: list[int] = []
        for document in documents:
            ids = rest + tokenize(document)
            rest = []
            if document.is_row:
                self.num_truncated += len(ids) > limit
                yield from self._sample(ids[:limit])
                continue
            if not document.is_last:
                keep = len(ids) - len(ids) % limit
                ids, rest = ids[:keep], ids[keep:]
            for start in range(0, len(ids), limit):
                yield from self._sample(ids[start : start + limit])

    def _sample(self, ids: list[int]) -> Iterator[array[int]]:
        if len(ids) > 1:
            yield array("i", [ids[0] | START, *ids[1:]])


class _Packer:
    """Samples of exactly `max_seq_len` tokens, filled with one document after the other."""

    num_truncated = 0

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len

    def samples(
        self, documents: Iterable[Document], tokenize: Callable[[Document], list[int]]
    ) -> Iterator[array[int]]:
        sample = array("i")
        starts, any_full = True, False
        for document in documents:
            ids = tokenize(document)
            position = 0
            while position < len(ids):
                piece = ids[position : position + self.max_seq_len - len(sample)]
                position += len(piece)
                if starts or not sample:
                    piece[0] |= START
                starts = False
                sample.extend(piece)
                if len(sample) == self.max_seq_len:
                    yield sample
                    sample, any_full = array("i"), True
            starts = document.is_last
        if not any_full and len(sample) > 1:
            yield sample
