"""
Rows and texts of a data source, one at a time: the file may be larger than memory.

A source is a file, a folder of files, a folder written by `datasets`, the id of a dataset on the hub, or
`memplan-docs`.

    .jsonl, .ndjson     an object per line
    .json               a list of objects, or an object per line
    .csv, .tsv          columns named in the first line
    .parquet            read with pyarrow, which `datasets` brings
    .txt, .md           one text

Importing this module imports none of the libraries that it reads with.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import DataError
from memplan.job.data_names import BUILT_IN_DATA, DATA_SUFFIXES, is_hub_dataset

TEXT_BLOCK_CHARACTERS = 4 << 20
"""A text file is handed out in blocks of about this size that end with a line."""
_JSON_BLOCK_CHARACTERS = 1 << 18
_PARQUET_ROWS = 256
_INSTALL = 'pip install "memplan[train]"'


@dataclass(frozen=True)
class Row:
    """One row of a table, by column, and where it stands."""

    fields: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Text:
    """A text file, or the next block of a long one."""

    text: str
    is_first: bool = True
    is_last: bool = True


def read_source(
    source: str, *, resolve: Callable[[str], Path], split: str, subset: str | None = None
) -> Iterator[Row | Text]:
    """
    Everything in a data source, in a fixed order.

    Args:
        source: as in the job file.
        resolve: turns a path of the job file into a real one.
        split: of a `datasets` folder or hub dataset that has several.
        subset: the configuration of a hub dataset that has several.

    Raises:
        DataError: the source is missing, of an unknown kind, or holds something that cannot be read.
    """
    if source == BUILT_IN_DATA:
        paths = _docs_files()
    else:
        path = resolve(source)
        if is_hub_dataset(source, path):
            yield from _read_hub(source, split, subset)
            return
        if not path.exists():
            raise DataError(
                f"the data `{source}` does not exist ({path})", hint="set `data.train`, e.g. `memplan-docs`"
            )
        if path.is_dir() and any(
            (path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")
        ):
            yield from _read_datasets(path, split)
            return
        paths = _files_of(path)
    for path in paths:
        yield from _READERS[path.suffix](path)


def _files_of(path: Path) -> list[Path]:
    known = ", ".join(DATA_SUFFIXES)
    if path.is_file():
        if path.suffix not in DATA_SUFFIXES:
            raise DataError(f"`{path}` is none of {known}", hint="write it as JSON lines")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in DATA_SUFFIXES)
    if not files:
        raise DataError(f"the folder `{path}` holds no {known} files")
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


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` is not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror or error}") from error


def _read_text(path: Path) -> Iterator[Text]:
    with _readable(path), path.open(encoding="utf-8") as file:
        block, is_first = file.read(TEXT_BLOCK_CHARACTERS), True
        while block:
            block += file.readline()
            following = file.read(TEXT_BLOCK_CHARACTERS)
            yield Text(block, is_first=is_first, is_last=not following)
            block, is_first = following, False


def _read_json_lines(path: Path) -> Iterator[Row]:
    with _readable(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"`{path}` line {number}"
                try:
                    yield _row(json.loads(line), where)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, not an object with named columns")
    return Row(value, where)


def _read_json(path: Path) -> Iterator[Row]:
    with _readable(path), path.open(encoding="utf-8") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        if first == "[":
            yield from _items(file, path)
            return
    yield from _read_json_lines(path)


def _items(file: Any, path: Path) -> Iterator[Row]:
    """The items of a list behind its `[`, decoded one by one from a buffer that holds little more than one."""
    decoder = json.JSONDecoder()
    buffer, position, number, at_end = "", 0, 1, False
    while True:
        position = _skip(buffer, position)
        where = f"`{path}` item {number}"
        if buffer.startswith("]", position):
            return
        try:
            value, position = decoder.raw_decode(buffer, position)
        except json.JSONDecodeError as error:
            if at_end:
                raise DataError(f"{where} is not JSON: {error.msg}") from error
            buffer = buffer[position:]
            more = file.read(max(_JSON_BLOCK_CHARACTERS, len(buffer)))
            buffer, position, at_end = buffer + more, 0, not more
            continue
        yield _row(value, where)
        number += 1


def _skip(buffer: str, position: int) -> int:
    """The place of the next item: behind spaces and the comma."""
    while position < len(buffer) and buffer[position] in " \t\r\n,":
        position += 1
    return position


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with _readable(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            for row in reader:
                where = f"`{path}` line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where} has not as many cells as the first line has columns")
                yield Row(row, where)
        except csv.Error as error:
            raise DataError(f"`{path}` line {reader.line_num} is not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"`{path}` needs `pyarrow`, which is not installed", hint=_INSTALL) from None
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"`{path}` row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"`{path}` cannot be read as Parquet: {_first_line(error)}") from error


def _read_datasets(path: Path, split: str) -> Iterator[Row]:
    datasets = _import_datasets(f"`{path}` was written by `datasets`, which is not installed")
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"`{path}` cannot be read by `datasets`: {_first_line(error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(
                f"`{path}` has no split `{split}`; it has {', '.join(f'`{name}`' for name in dataset)}",
                hint="name one with `--set data.split=NAME`",
            )
        dataset = dataset[split]
    for number, fields in enumerate(dataset, start=1):
        yield Row(fields, f"`{path}` row {number}")


def _read_hub(name: str, split: str, subset: str | None) -> Iterator[Row]:
    datasets = _import_datasets(f"`{name}` is read with `datasets`, which is not installed")
    try:
        dataset = datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        raise DataError(
            f"`{name}` is neither a file here nor a dataset that can be had from the hub: {_first_line(error)}",
            hint="check `data.train`, `data.subset` and `data.split`",
        ) from error
    for number, fields in enumerate(dataset, start=1):
        yield Row(fields, f"`{name}` row {number}")


def _import_datasets(message: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(message, hint=_INSTALL) from None
    return datasets


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_READERS: dict[str, Callable[[Path], Iterator[Row | Text]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
