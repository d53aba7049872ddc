"""
Checkpoints that are complete or absent.

A checkpoint is written into a hidden folder beside its final place, every file is flushed to the disk,
`manifest.json` with the size and SHA-256 of each is written last, and one rename publishes it. Whatever stops
the process in between leaves the earlier checkpoints as they were. Reading verifies the manifest and falls
back to the one before.

    checkpoints/step-50/
        state/                                             what trains and the optimizer's states: training_state.py
        adapter_config.json, adapter_model.safetensors     lora: the adapters again, in PEFT's own format
        npt.safetensors                                    npt: its tensors again
        state.json                                         step and what it must fit to
        manifest.json

With several processes all of them write into the hidden folder, which has to be the same one for all, and the first
publishes when every one has written.

The random state is not stored: it is a function of (seed, step, micro batch), see `loop.seed_micro_batch`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from memplan.errors import RunError

MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d+)")
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class State:
    """What a checkpoint says about itself; all but `step` must be the same again to continue from it."""

    step: int
    """Optimizer steps done."""
    data: str
    """Fingerprint of the samples."""
    base: str
    """Fingerprint of the weights that are not in the checkpoint."""
    global_batch_size: int


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    state: State

    def check_continues(self, state: State) -> None:
        """
        Raises:
            RunError: a run in this state is another than the one that was saved.
        """
        causes = {
            "data": "the data or the tokenizer has changed",
            "base": "the base weights are not those it was trained on",
            "global_batch_size": "the global batch size has changed",
        }
        for name, cause in causes.items():
            if getattr(self.state, name) != getattr(state, name):
                raise RunError(
                    f"`{self.path}` cannot be continued: {cause}",
                    hint="bring it back, or start anew with `--set train.output_dir=...`",
                )


class Writers(Protocol):
    """The processes that write a folder together; `group.Group`."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that publishes."""

    def agree(self, error: str | None) -> str | None:
        """The first error of any process, on all of them."""


class _OneWriter:
    is_first = True

    def agree(self, error: str | None) -> str | None:
        return error


def save_checkpoint(
    root: Path,
    state: State,
    write: Callable[[Path], None],
    writers: Writers | None = None,
    *,
    keep: int = 3,
    best_step: int | None = None,
) -> Path:
    """
    Publish the checkpoint of `state.step` under `root`, then delete all but the newest.

    Args:
        root: the folder `checkpoints` of a run.
        write: puts weights and optimizer into the folder it is given; every process calls it.
        writers: the processes that write; None: this one.
        keep: how many of the newest are kept.
        best_step: kept too.

    Raises:
        RunError: it could not be written; the earlier checkpoints are intact.
    """
    destination = root / f"step-{state.step}"
    writers = writers or _OneWriter()
    publish_folder(destination, state, write, writers)
    if writers.is_first:
        older = [(step, path) for step, path in _published(root) if step < state.step]
        for step, path in older[keep - 1 :]:
            if step != best_step:
                shutil.rmtree(path, ignore_errors=True)
    return destination


def publish_folder(
    destination: Path, state: State, write: Callable[[Path], None], writers: Writers | None = None
) -> None:
    """
    Let `write` fill a folder and make it appear at `destination` in one step, flushed to the disk, with its
    state and a manifest.

    A folder that is already there is replaced only after the new one is complete.

    Raises:
        RunError: it could not be written; `destination` is as it was.
    """
    writers = writers or _OneWriter()
    root = destination.parent
    folder = root / f"{_UNFINISHED}{destination.name}"

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    def publish() -> None:
        (folder / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        _seal(folder)
        _replace(folder, destination)

    try:
        for action, is_for_all in ((prepare, False), (lambda: write(folder), True), (publish, False)):
            reason = writers.agree(_problem(action, root) if is_for_all or writers.is_first else None)
            if reason is not None:
                raise RunError(
                    f"`{destination}` could not be saved: {reason}",
                    hint="free some space or mend the folder; everything saved before is intact",
                )
    except Exception:
        if writers.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _problem(action: Callable[[], None], root: Path) -> str | None:
    """Why the disk would not have it; other errors are raised."""
    try:
        action()
    except Exception as error:
        if isinstance(error, MemoryError) or not _is_disk_error(error):
            raise
        return _reason(error, root)
    return None


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"files": manifest}, indent=2) + "\n", encoding="utf-8")
    for path in [*files, folder / MANIFEST]:
        _fsync(path)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _fsync(path)


def _replace(folder: Path, destination: Path) -> None:
    old = destination.with_name(f"{_UNFINISHED}old-{destination.name}")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.rename(old)
    folder.rename(destination)
    _fsync(destination.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_disk_error(error: Exception) -> bool:
    # safetensors and torch.save report a full disk in exceptions of their own.
    text = str(error)
    own = (
        type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in text or "unexpected pos" in text
    )
    return isinstance(error, (OSError, RunError)) or own


def _reason(error: Exception, root: Path) -> str:
    with suppress(OSError):
        free = shutil.disk_usage(root).free
        if free < 1 << 20 or "No space left" in str(error) or "os error 28" in str(error):
            return "the disk is full"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)


def load_latest(root: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """
    The newest complete checkpoint under `root`; None if there is none.

    `warn` gets a sentence for each one that is damaged and passed over. What an interrupted save left is
    removed.
    """
    for _, path in _published(root):
        problem = find_damage(path)
        if problem is None:
            return Checkpoint(path, read_state(path))
        warn(f"checkpoint `{path}` is damaged ({problem}); using the one before it")
    return None


def remove_unfinished(root: Path) -> None:
    """Delete what a save that was interrupted has left behind."""
    for path in root.glob(f"{_UNFINISHED}*") if root.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def read_state(folder: Path) -> State:
    """The state of a published folder."""
    return State(**json.loads((folder / STATE).read_text(encoding="utf-8")))


def find_damage(folder: Path) -> str | None:
    """
    What is wrong with a published folder: a file missing, of another size, or of another content; None if
    nothing.
    """
    try:
        files: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


def published_step(folder: Path) -> int | None:
    """The step of a published folder; None if it is missing or damaged."""
    return read_state(folder).step if folder.is_dir() and find_damage(folder) is None else None


def has_checkpoint(root: Path) -> bool:
    """Whether anything was ever published under `root`, without verifying it."""
    return bool(_published(root))


def _published(root: Path) -> list[tuple[int, Path]]:
    """Steps and folders `step-N`, newest first."""
    if not root.is_dir():
        return []
    named = [(match, path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in named), reverse=True)
