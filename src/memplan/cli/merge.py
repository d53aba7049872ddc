"""`memplan merge`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Folder of a run, of one of its checkpoints, or of a peft adapter"
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", metavar="FOLDER", help="Where the merged model goes: new, or empty")
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Model to merge into; default: the one trained beside"),
    ] = None,
) -> int:
    """
    Add LoRA adapters to the weights they were trained beside

    Writes a model that transformers loads: the base's files with the same layout and dtypes, its config
    and tokenizer. Takes little more RAM than the largest layer. Adapters trained beside a quantised base are
    merged into the base in full precision. Needs `pip install "memplan[train]"`.
    """
    from memplan.cli.output import emit
    from memplan.train.speech import say

    _check_packages()
    from memplan.train.merge import explain
    from memplan.train.merge import merge as run_merge

    merged = run_merge(Path(source), Path(output), base=base, say=say)
    emit("\n".join(explain(merged)) + "\n")
    return 0


def _check_packages() -> None:
    """Raises RunError if what reads weights is not installed."""
    from importlib.util import find_spec

    from memplan.errors import RunError
    from memplan.train.refusals import INSTALL

    missing = [name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise RunError(f"merging needs {names}, not installed here", hint=INSTALL)
