"""Pickles of plain data, read without trusting them: no class is ever looked up, and so no code is run."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memplan.errors import SnapshotError

SUFFIXES = (".pickle", ".pkl")
_PROTO = b"\x80"
"""The first byte of every pickle of protocol 2 and above; no text in UTF-8 begins with it."""

_HOW = (
    "record one with `torch.cuda.memory._record_memory_history()` and write it with "
    "`torch.cuda.memory._dump_snapshot(path)`"
)


class _Refused(Exception):
    """A pickle asks for a class or a function."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("an object outside of the file")


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle: by its suffix, or by how it begins. A pipe is not looked into."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(1) == _PROTO
    except OSError:
        return False


def load_plain(path: Path) -> Any:
    """
    Dicts, lists, tuples, strings and numbers of a pickle file.

    Raises:
        SnapshotError: it cannot be read, is no pickle, or holds anything but plain data.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SnapshotError(f"`{path}` cannot be read: {error.strerror or error}", hint=_HOW) from error
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except _Refused as error:
        raise SnapshotError(
            f"`{path}` is refused: a memory snapshot holds plain data, this pickle asks for `{error}`",
            hint="it could run code of its author when loaded; do not open it",
        ) from None
    except Exception as error:  # a damaged pickle can end in an error of any kind
        raise SnapshotError(
            f"`{path}` is no pickle that can be read: {str(error) or type(error).__name__}", hint=_HOW
        ) from error


class Fields:
    """Fields of the dicts in one file; what is missing or of another type is a SnapshotError that names the file."""

    def __init__(self, source: str) -> None:
        self.source = source

    def dicts(self, value: Any, what: str) -> Iterator[Mapping[str, Any]]:
        """The items of a list of dicts."""
        if not isinstance(value, (list, tuple)):
            raise self.error(f"`{what}` is no list")
        for item in value:
            if not isinstance(item, Mapping):
                raise self.error(f"`{what}` holds something else than dicts")
            yield item

    def number(self, entry: Mapping[str, Any], *names: str, default: int | None = None) -> int:
        """The integer under the first of these names that is there."""
        for name in names:
            value = entry.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if value is not None:
                raise self.error(f"`{name}` is no whole number")
        if default is None:
            raise self.error(f"an entry has no `{names[0]}`")
        return default

    def size(self, entry: Mapping[str, Any], *names: str, default: int | None = None) -> int:
        """As `number`, of something that is never negative."""
        value = self.number(entry, *names, default=default)
        if value < 0:
            raise self.error(f"`{names[0]}` is {value}")
        return value

    def error(self, problem: str) -> SnapshotError:
        return SnapshotError(f"`{self.source}` is no memory snapshot: {problem}", hint=_HOW)
