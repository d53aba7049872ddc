"""
A peer's process: `python -m benchmarks.peers.child PEER < questions.json`, a line of JSON per answer.

Imports nothing of memplan, so that any interpreter can run it.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from benchmarks.peers.adapters import ADAPTERS, CannotExpress, Question


def main() -> None:
    """The first line is the peer's version, or null where it is not installed."""
    name = sys.argv[1]
    module, adapter = ADAPTERS[name]
    questions = json.load(sys.stdin)
    print(json.dumps({"version": _version(name) if find_spec(module) else None}), flush=True)
    for question in questions:
        print(json.dumps(_answer(adapter, question)), flush=True)


def _answer(adapter: Any, question: Question) -> dict[str, Any]:
    start = time.process_time()
    try:
        predicted = adapter(question)
    except CannotExpress as error:
        return {"id": question["id"], "word": f"cannot express {error}"}
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        return {"id": question["id"], "word": f"refused or crashed: {type(error).__name__}: {reason}"}
    return {"id": question["id"], "predicted": predicted, "seconds": time.process_time() - start}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
