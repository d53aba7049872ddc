"""
From the job's data to micro batches: documents, samples, and an order that is a pure function of (seed,
step).

A row of a JSONL file or of a `datasets` folder is one sample and is truncated at `max_seq_len`. A text or
Markdown file is cut into consecutive samples of `max_seq_len`, so nothing of it is lost. With packing every
document, row or file, is concatenated into one stream that is cut into full samples; a sample may then hold
parts of several documents, and attention sees all of them.

Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from memplan.errors import DataError
from memplan.job.load import BUILT_IN_DATA
from memplan.train.tokens import has_tokenizer, model_folder

if TYPE_CHECKING:
    from torch import Tensor

    from memplan.job.load import LoadedJob


ROW_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md")
IGNORE_INDEX = -100
PAD_ID = 0
"""Any id will do: no loss is taken on padding, and causal attention never looks right."""


@dataclass(frozen=True)
class Document:
    """
    One text. A `row` is a sample by itself and is truncated; other documents are cut into several samples.
    """

    text: str
    is_row: bool


def read_documents(
    source: str, *, column: str, resolve: Callable[[str], Path], split: str = "train"
) -> Iterator[Document]:
    """
    The documents of a data source, in a fixed order, empty ones left out.

    Args:
        source: a JSONL, text or Markdown file, a folder of them, a folder written by `datasets`, or
            `memplan-docs`.
        column: holds the text in JSONL and `datasets` rows.
        resolve: turns a path of the job file into a real one.
        split: split of a `datasets` folder that has several.

    Raises:
        DataError: the source is missing, of an unknown kind, or holds a row that cannot be read.
    """
    if source == BUILT_IN_DATA:
        paths = _docs_files()
    else:
        path = resolve(source)
        if not path.exists():
            raise DataError(
                f"the data `{source}` does not exist ({path})", hint="set `data.train`, e.g. `memplan-docs`"
            )
        if path.is_dir() and any(
            (path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")
        ):
            yield from _read_datasets(path, column, split)
            return
        paths = _files_of(path)
    for path in paths:
        if path.suffix in ROW_SUFFIXES:
            yield from _read_rows(path, column)
        else:
            text = _read_text(path)
            if text.strip():
                yield Document(text, is_row=False)


def _files_of(path: Path) -> list[Path]:
    known = ROW_SUFFIXES + TEXT_SUFFIXES
    if path.is_file():
        if path.suffix not in known:
            raise DataError(
                f"`{path}` is none of {', '.join(known)}", hint="write it as JSON lines with a text column"
            )
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in known)
    if not files:
        raise DataError(f"the folder `{path}` holds no {', '.join(known)} files")
    return files


def _docs_files() -> list[Path]:
    import memplan

    package = Path(memplan.__file__).parent
    shipped = package / "profiles" / "text"
    checkout = package.parent.parent
    files = list(shipped.glob("*.md"))
    if not files and (checkout / "pyproject.toml").exists():
        files = [*(checkout / "docs").glob("*.md"), *checkout.glob("README.md")]
    files.sort(key=lambda path: path.name)
    if not files:
        raise DataError(
            f"this installation holds no documentation to train on ({shipped})",
            hint="set `data.train` to a file of yours",
        )
    return files


def _read_text(path: Path) -> str:
    with _readable(path):
        return path.read_text(encoding="utf-8")


def _lines(path: Path) -> Iterator[str]:
    """Lines one by one: the file may be larger than memory."""
    with _readable(path), path.open(encoding="utf-8") as file:
        yield from file


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` is not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror}") from error


def _read_rows(path: Path, column: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"`{path}` line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} is a {type(row).__name__}, not an object with a column `{column}`")
        yield from _row_document(row, column, where)


def _read_datasets(path: Path, column: str, split: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"`{path}` was written by `datasets`, which is not installed", hint='pip install "memplan[train]"'
        ) from None
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"`{path}` cannot be read by `datasets`: {str(error).splitlines()[0]}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(
                f"`{path}` has no split `{split}`; it has {', '.join(f'`{name}`' for name in dataset)}"
            )
        dataset = dataset[split]
    for number, row in enumerate(dataset, start=1):
        yield from _row_document(row, column, f"`{path}` row {number}")


def _row_document(row: dict[str, object], column: str, where: str) -> Iterator[Document]:
    if column not in row:
        columns = ", ".join(f"`{name}`" for name in row) or "none"
        raise DataError(
            f"{where} has no column `{column}`; it has {columns}",
            hint="name the text column: `--set data.text=NAME`",
        )
    text = row[column]
    if not isinstance(text, str):
        raise DataError(f"{where}: column `{column}` holds a {type(text).__name__}, not text")
    if text.strip():
        yield Document(text, is_row=True)


@dataclass(frozen=True)
class Samples:
    """Token ids of all samples, end to end: sample `i` is `tokens[offsets[i] : offsets[i + 1]]`."""

    tokens: array[int]
    offsets: array[int]
    num_truncated: int
    """Rows that lost tokens because they were longer than `max_seq_len`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> array[int]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def length(self, index: int) -> int:
        """Tokens of one sample."""
        return self.offsets[index + 1] - self.offsets[index]

    def fingerprint(self) -> str:
        """SHA-256 of every token and every boundary: equal only for equal data, tokenizer and cut."""
        digest = hashlib.sha256(self.tokens.tobytes())
        digest.update(self.offsets.tobytes())
        return digest.hexdigest()


def build_samples(
    documents: Iterable[Document], encode: Callable[[str], list[int]], *, max_seq_len: int, packing: bool
) -> Samples:
    """
    Tokenise and cut documents. A sample has 2 to `max_seq_len` tokens: one token alone predicts nothing.

    Raises:
        DataError: no sample is left.
    """
    tokens, offsets = array("i"), array("q", [0])
    num_truncated = 0

    def add(ids: Iterable[int]) -> None:
        tokens.extend(ids)
        offsets.append(len(tokens))

    stream: list[int] = []
    for document in documents:
        ids = encode(document.text)
        if packing:
            stream += ids
            while len(stream) >= max_seq_len:
                add(stream[:max_seq_len])
                del stream[:max_seq_len]
        elif document.is_row:
            num_truncated += len(ids) > max_seq_len
            if min(len(ids), max_seq_len) > 1:
                add(ids[:max_seq_len])
        else:
            for start in range(0, len(ids), max_seq_len):
                if len(ids) - start > 1:
                    add(ids[start : start + max_seq_len])
    if packing and len(offsets) == 1 and len(stream) > 1:
        add(stream)
    if len(offsets) == 1 or max_seq_len < 2:
        raise DataError(
            f"the data holds no sample of 2 tokens or more (max_seq_len {max_seq_len})",
            hint="check `data.train` and `data.text`",
        )
    return Samples(tokens, offsets, num_truncated)


@dataclass(frozen=True)
class MicroBatch:
    """
    One forward pass: `input_ids` and `labels`, both (batch, seq) int64 on the host.

    Short samples are padded on the right up to the longest of the batch. `labels` are the ids again,
    `IGNORE_INDEX` on padding; the loss shifts them. There is no attention mask: see `PAD_ID`.
    """

    input_ids: Tensor
    labels: Tensor


@dataclass
class Batches:
    """
    Which samples each step sees: the same for the same seed, whenever and wherever it is asked. Steps count
    from 1.
    """

    samples: Samples
    micro_batch_size: int
    gradient_accumulation_steps: int
    seed: int
    _order: tuple[int, list[int]] = field(default=(-1, []), init=False, repr=False)
    """The epoch at hand and its order: shuffling millions of samples is not free."""

    def order(self, epoch: int) -> list[int]:
        """
        Sample indices of one pass over the data.

        The very first micro batch holds the longest samples, so that a run that cannot fit fails at step 1.
        """
        count = len(self.samples)
        indices = list(range(count))
        random.Random(f"{self.seed}/{epoch}").shuffle(indices)
        if epoch == 0:
            longest = sorted(indices, key=self.samples.length, reverse=True)[: self.micro_batch_size]
            first = set(longest)
            indices = longest + [index for index in indices if index not in first]
        return indices

    def sample_indices(self, step: int) -> list[int]:
        """Samples of an optimizer step, over all its micro batches; epochs follow one another."""
        size = self.micro_batch_size * self.gradient_accumulation_steps
        count = len(self.samples)
        indices: list[int] = []
        position = (step - 1) * size
        while len(indices) < size:
            epoch, offset = divmod(position, count)
            if self._order[0] != epoch:
                self._order = (epoch, self.order(epoch))
            taken = self._order[1][offset : offset + size - len(indices)]
            indices += taken
            position += len(taken)
        return indices

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

        rows = [self.samples[index] for index in indices]
        shape = (len(rows), max(map(len, rows)))
        input_ids = torch.full(shape, PAD_ID, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            labels[row, : len(ids)] = input_ids[row, : len(ids)]
        return MicroBatch(input_ids, labels)

    def one_pass(self) -> Iterator[MicroBatch]:
        """Every sample once, in the order of the data: for evaluation."""
        count, size = len(self.samples), self.micro_batch_size
        for start in range(0, count, size):
            yield self._collate(range(start, min(start + size, count)))

    def _rows(self, step: int, micro: int) -> list[int]:
        start = micro * self.micro_batch_size
        return self.sample_indices(step)[start : start + self.micro_batch_size]


def count_truncated(loaded: LoadedJob, max_seq_len: int) -> tuple[int, int] | None:
    """
    How many samples the job's data has, and how many of them lose tokens at `max_seq_len`.

    Text files and packed data are cut, not truncated, and lose none. Needs no torch: a model folder's
    `tokenizer.json` is read with `tokenizers`, and random weights without one train on bytes.

    Returns:
        (samples, longer), or None where the data or the tokenizer cannot be read here.
    """
    job = loaded.job
    if job.data.train is None:
        return None
    lengths = _length_function(loaded)
    if lengths is None:
        return None
    num_samples = num_longer = 0
    try:
        for document in read_documents(job.data.train, column=job.data.text, resolve=loaded.resolve_path):
            length = lengths(document.text)
            if document.is_row and not job.packing:
                num_samples += 1
                num_longer += length > max_seq_len
            else:
                num_samples += -(-length // max_seq_len)
    except DataError:
        return None
    return num_samples, num_longer


def _length_function(loaded: LoadedJob) -> Callable[[str], int] | None:
    folder = model_folder(loaded.job.model, loaded.base_dir)
    if loaded.job.weights == "random" and not has_tokenizer(folder):
        return lambda text: len(text.encode("utf-8")) + 1
    file = folder / "tokenizer.json" if folder is not None else None
    if file is None or not file.exists():
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text).ids) + 1
