"""Checkpoints are complete or absent, and what is read back is what was written."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from memplan.errors import RunError
from memplan.train.checkpoint import (
    State,
    find_damage,
    has_checkpoint,
    load_latest,
    publish_folder,
    remove_unfinished,
    save_checkpoint,
)


def _state(step: int) -> State:
    return State(step, "data", "base", 4)


def _write(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights").write_text(text)
        (folder / "more").mkdir()
        (folder / "more" / "states").write_text(text * 2)

    return write


def _fail(warning: str) -> None:
    raise AssertionError(warning)


def test_the_newest_checkpoint_is_loaded(tmp_path: Path) -> None:
    """Steps count as numbers, not as text: 10 is after 9."""
    for step in (9, 10):
        save_checkpoint(tmp_path, _state(step), _write(str(step)))

    found = load_latest(tmp_path, warn=_fail)

    assert found is not None
    assert _state(10) == found.state
    assert (found.path / "weights").read_text() == "10"


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    """No folder and an empty folder hold no checkpoint."""
    assert load_latest(tmp_path / "nowhere", warn=_fail) is None
    assert load_latest(tmp_path, warn=_fail) is None
    assert not has_checkpoint(tmp_path)


def test_the_last_three_are_kept(tmp_path: Path) -> None:
    """A fourth checkpoint takes the place of the oldest."""
    for step in (2, 4, 6, 8):
        save_checkpoint(tmp_path, _state(step), _write(str(step)))

    assert {"step-4", "step-6", "step-8"} == {path.name for path in tmp_path.iterdir()}


def test_nothing_is_deleted_before_the_new_one_is_complete(tmp_path: Path) -> None:
    """While the fourth is being written the first three are all there."""
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, _state(step), _write(str(step)))
    seen: list[set[str]] = []

    def write(folder: Path) -> None:
        seen.append({path.name for path in tmp_path.glob("step-*")})

    save_checkpoint(tmp_path, _state(8), write)

    assert [{"step-2", "step-4", "step-6"}] == seen


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "more" / "states").write_text("6x"), "states has changed"),
        (lambda folder: (folder / "weights").write_text("longer"), "weights has 6 bytes instead of 1"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    """Changed, short and missing files are noticed; the one before is used, and the reason is said."""
    for step in (4, 6):
        save_checkpoint(tmp_path, _state(step), _write(str(step)))
    damage(tmp_path / "step-6")
    warnings: list[str] = []

    found = load_latest(tmp_path, warn=warnings.append)

    assert found is not None
    assert found.state.step == 4
    assert len(warnings) == 1
    assert words in warnings[0]


def test_a_kill_while_saving_leaves_the_one_before(tmp_path: Path) -> None:
    """SIGKILL in the middle of writing publishes nothing and harms nothing; what it left is removed."""
    save_checkpoint(tmp_path, _state(2), _write("2"))

    def write_half(folder: Path) -> None:
        (folder / "weights").write_text("4")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            save_checkpoint(tmp_path, _state(4), write_half)
        finally:  # whatever goes wrong, the tests go on in one process alone
            os._exit(0)
    _, status = os.waitpid(child, 0)

    assert os.WTERMSIG(status) == signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".unfinished-step-4", "step-2"]
    remove_unfinished(tmp_path)
    found = load_latest(tmp_path, warn=_fail)
    assert found is not None
    assert found.state.step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
    ],
)
def test_a_full_disk_is_explained(tmp_path: Path, error: Exception) -> None:
    """A write that fails leaves the earlier checkpoint and nothing half."""
    save_checkpoint(tmp_path, _state(2), _write("2"))

    def write(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise error

    with pytest.raises(RunError, match=r"step-4` could not be saved: (the disk is full|PytorchStreamWriter)"):
        save_checkpoint(tmp_path, _state(4), write)

    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert find_damage(tmp_path / "step-2") is None


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    """A bug while saving keeps its own type."""

    def write(folder: Path) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        save_checkpoint(tmp_path, _state(4), write)


def test_publishing_again_replaces_the_folder(tmp_path: Path) -> None:
    """Final weights of a longer run take the place of those of a shorter one, whole."""
    for text in ("short", "long"):
        publish_folder(tmp_path / "final", _state(1), _write(text))

    assert (tmp_path / "final" / "weights").read_text() == "long"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert find_damage(tmp_path / "final") is None
