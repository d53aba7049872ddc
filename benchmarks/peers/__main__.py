"""
memplan and other tools on the same published runs. `python -m benchmarks.peers --python PATH`

Writes docs/peers.md. PATH is an interpreter with the peers installed (default: this one): `pip install fitcheck-llm
canifinetune fitscout ftuneai torch-preflight accelerate transformers peft torch`. Peers are no dependency of memplan.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from threading import Event, Timer
from typing import Any

import memplan
from benchmarks.peers.adapters import ADAPTERS
from benchmarks.peers.errors import Tool
from benchmarks.peers.page import render
from benchmarks.peers.questions import asked, measured, ours, question
from benchmarks.published import Case, load_published
from benchmarks.speed import process_seconds

ROOT = Path(__file__).parent.parent.parent
REPORT = ROOT / "docs" / "peers.md"
ENGINES = ("shape", "shape, told the software", "trace")
NAMES = {"torch": "torch MemTracker", "accelerate": "accelerate estimate-memory"}


def main() -> None:
    """Ask everybody, write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="interpreter with the peers installed")
    parser.add_argument(
        "--limit",
        type=float,
        default=1800.0,
        help="seconds that a peer gets for all runs; what it answered by then counts",
    )
    options = parser.parse_args()
    os.environ |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "HF_HUB_OFFLINE": "1"}
    cases = asked(load_published())
    tools = [_memplan(cases, engine) for engine in ENGINES]
    questions = [question(case) for case in cases]
    tools += [_peer(name, questions, options.python, options.limit) for name in ADAPTERS]
    peaks = {case.id: measured(case) for case in cases}
    methods = {case.id: case.method for case in cases}
    page = render(tools, peaks, methods, sum(bool(case.kernels) for case in cases))
    REPORT.write_text(page, encoding="utf-8")
    print(page)


def _memplan(cases: list[Case], engine: str) -> Tool:
    replies = [ours(case, engine) for case in cases]
    return Tool(f"memplan, {engine}", memplan.__version__, replies, _own_process(cases, replies, engine))


def _own_process(cases: list[Case], replies: list[dict[str, Any]], engine: str) -> float | None:
    """Of `memplan estimate`, which cannot be told of other software."""
    if engine not in ("shape", "trace"):
        return None
    answered = next(reply["id"] for reply in replies if "predicted" in reply)
    fields = next(case.fields for case in cases if case.id == answered)
    with TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(fields), encoding="utf-8")
        return process_seconds([sys.executable, "-m", "memplan", "estimate", str(job), "--engine", engine])


def _peer(name: str, questions: list[dict[str, Any]], python: str, limit: float) -> Tool:
    label = NAMES.get(name, name)
    version, replies = ask(name, questions, python, limit)
    answered = [reply["id"] for reply in replies if "predicted" in reply]
    if not answered:
        return Tool(label, version, replies)
    first = [entry for entry in questions if entry["id"] == answered[0]]
    return Tool(label, version, replies, _peer_process(name, first, python))


def ask(
    name: str, questions: list[dict[str, Any]], python: str, limit: float
) -> tuple[str | None, list[dict[str, Any]]]:
    """
    (version, a reply for each question). A process that ends early, or is ended after `limit` seconds, leaves the
    replies that it gave until then, and its reason as the word of the others.
    """
    lines, in_time = _lines_within(
        [python, "-m", "benchmarks.peers.child", name], json.dumps(questions), limit
    )
    word = "crashed the process" if in_time else f"no answer within the limit of {limit:.0f} s for all runs"
    answers = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    version = answers[0]["version"] if answers else None
    if version is None and answers:
        return None, [{"id": entry["id"], "word": "not installed"} for entry in questions]
    replies = answers[1:]
    silent = questions[len(replies) :]
    return version, replies + [{"id": entry["id"], "word": word} for entry in silent]


def _lines_within(command: list[str], text: str, limit: float) -> tuple[list[str], bool]:
    """
    The whole lines that a process wrote, read as they come, and whether it ended by itself within `limit` seconds.
    """
    with TemporaryFile("w+") as questions, TemporaryFile("w+") as errors:
        questions.write(text)
        questions.seek(0)
        with subprocess.Popen(
            command, stdin=questions, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child:
            is_over = Event()

            def end() -> None:
                is_over.set()
                child.kill()

            timer = Timer(limit, end)
            timer.start()
            assert child.stdout is not None
            lines = [line.rstrip("\n") for line in child.stdout if line.endswith("\n")]
            timer.cancel()
    return lines, not is_over.is_set()


def _peer_process(name: str, questions: list[dict[str, Any]], python: str) -> float:
    program = (
        "import json, subprocess, sys; subprocess.run(sys.argv[2:], input=sys.argv[1], text=True, check=True)"
    )
    child = [python, "-m", "benchmarks.peers.child", name]
    plain = [sys.executable, "-c", program, json.dumps(questions), *child]
    starter = [sys.executable, "-c", program, "[]", sys.executable, "-c", "pass"]
    empty = [sys.executable, "-c", "pass"]
    return process_seconds(plain) - process_seconds(starter) + process_seconds(empty)


if __name__ == "__main__":
    main()
