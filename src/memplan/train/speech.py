"""One line for the person at the terminal, from the process that speaks for its group."""

from __future__ import annotations

import sys

_speakers: dict[str, str | None] = {"prefix": ""}


def speak(*, prefix: str | None = "") -> None:
    """What `say` puts before its lines from now on; None: nothing is said at all, for one process of several."""
    _speakers["prefix"] = prefix


def say(text: str = "") -> None:
    """One line for the person at the terminal."""
    prefix = _speakers["prefix"]
    if prefix is not None:
        empty_lines = "\n" * (len(text) - len(text.lstrip("\n")))
        words = text.lstrip("\n")
        print(f"{empty_lines}{prefix}{words}" if words else text, file=sys.stderr, flush=True)
