"""
The ```console blocks of a page: commands and what they print, run and not typed.

In a block, lines that begin with `$ ` are commands and what follows is their output. A line `...` leaves
something out: what stands before it is the beginning of the output, and what stands after it goes on from the
line that begins with the most words in common. Refreshing a block keeps the number of lines shown between
elisions.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache

ELISION = "..."
PROMPT = "$ "
WIDTH = "100"
"""Columns of a page; what memplan takes where there is no terminal."""

_BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)


class StaleExample(Exception):
    """An example can no longer be refreshed by itself: a person has to look at it."""


def refresh(text: str) -> str:
    """The page with every console block as its commands print it today."""
    return _BLOCK.sub(lambda match: _refresh_block(match[0]), text)


def commands(text: str) -> Iterator[str]:
    """Every command in the console blocks of a page, without its prompt."""
    for match in _BLOCK.finditer(text):
        for command, _ in _split(match[0]):
            yield command


def _refresh_block(block: str) -> str:
    lines = []
    for command, shown in _split(block):
        lines.append(PROMPT + command)
        lines += excerpt(run(command), shown, command)
    return "\n".join(lines) + "\n"


def _split(block: str) -> list[tuple[str, list[str]]]:
    """The commands of a block, each with the lines shown of its output."""
    parts: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith(PROMPT):
            parts.append((line.removeprefix(PROMPT), []))
        elif parts:
            parts[-1][1].append(line)
    return parts


def excerpt(output: list[str], shown: list[str], command: str) -> list[str]:
    """
    The lines of `output` that stand where those of `shown` stood.

    >>> excerpt(["one", "two", "three", "four x", "five"], ["one", "...", "four", "..."], "count")
    ['one', '...', 'four x', '...']
    >>> excerpt(["one", "two"], [], "count")
    ['one', 'two']
    """
    segments = _segments(shown)
    lines: list[str] = []
    position = 0
    for index, segment in enumerate(segments):
        if index:
            lines.append(ELISION)
            if not segment:
                break
            position = _most_alike(output, position, segment[0], command)
        stop = len(output) if index == len(segments) - 1 else position + len(segment)
        lines += output[position:stop]
        position = stop
    return lines


def _segments(shown: list[str]) -> list[list[str]]:
    segments: list[list[str]] = [[]]
    for line in shown:
        if line == ELISION:
            segments.append([])
        else:
            segments[-1].append(line)
    return segments


def _most_alike(output: list[str], start: int, line: str, command: str) -> int:
    """Index, from `start` on, of the first line that has the most leading words in common with `line`."""
    counts = [_common_words(candidate, line) for candidate in output[start:]]
    if not any(counts):
        raise StaleExample(f"`{command}` prints no line any more that begins like `{line}`")
    return start + counts.index(max(counts))


def _common_words(left: str, right: str) -> int:
    pairs = zip(left.split(), right.split())
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


@cache
def run(command: str) -> list[str]:
    """
    What `memplan ...` prints, stdout first, at the width of a page.

    Raises:
        StaleExample: the command is another one, or it failed by a fault of memplan's.
    """
    program, *arguments = shlex.split(command)
    if program != "memplan":
        raise StaleExample(f"`{command}` is not memplan; show it in a ```text block")
    from memplan.cli import main

    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        _environment(COLUMNS=WIDTH, NO_COLOR="1"),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        code = main(arguments)
    if code not in (0, 1, 2, 3):
        raise StaleExample(f"`{command}` ended with {code}: {stderr.getvalue().strip()}")
    return (stdout.getvalue() + stderr.getvalue()).rstrip("\n").split("\n")


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
