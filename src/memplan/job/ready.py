"""The ready jobs that come with memplan: `memplan jobs`, and any name where a job file is expected."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "profiles" / "jobs"


def list_jobs() -> list[tuple[str, str]]:
    """Name and description of every ready job, by name; the description is the first comment of its file."""
    return [(path.stem, _description(path)) for path in _files()]


def find_ready_job(name: str) -> Path | None:
    """The file of the ready job of this name; None if there is none."""
    path = FOLDER / f"{name}.yaml"
    return path if path.name == f"{name}.yaml" and path.is_file() else None


def nearest_job(name: str) -> str | None:
    """The ready job whose name is spelt most like this; None if none is close."""
    import difflib

    close = difflib.get_close_matches(name.lower(), [path.stem for path in _files()], n=1, cutoff=0.6)
    return close[0] if close else None


def _files() -> list[Path]:
    return sorted(FOLDER.glob("*.yaml"), key=lambda path: path.stem)


def _description(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
