"""A comparison as GitHub-flavoured markdown: the headline first, the breakdown folded away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.render.diff_text import alike_line, headline, notes_on, tables, tensor_rows, verdict_line
from memplan.render.markdown import MARKS, code, folded, table
from memplan.render.words import peak_moment

if TYPE_CHECKING:
    from memplan.snapshot.compare import Comparison


def diff_markdown(comparison: Comparison) -> str:
    """The whole comparison; every number of the text screen."""
    verdict = comparison.b.result.verdict
    mark = f"{MARKS[verdict.state]} " if verdict else ""
    fields = [f"{code(name)} {code(str(a))} → {code(str(b))}" for name, (a, b) in comparison.fields.items()]
    sides = [
        [label, code(side.source), peak_moment(side.result.peak), code(side.result.peak.where)]
        for label, side in (("A", comparison.a), ("B", comparison.b))
    ]
    breakdown = [
        table((title, "A", "B", "B - A"), rows, right=(1, 2, 3)) for title, rows in tables(comparison)
    ]
    rows = [[change, code(where), a, b] for change, where, a, b in tensor_rows(comparison)]
    tensors = table(("B - A", "tensors at the peak that differ", "A", "B"), rows, right=(0,)) if rows else ""
    parts = [
        f"### memplan diff: {mark}{headline(comparison)}",
        ", ".join(fields),
        table(("", "what", "peak", "at"), sides),
        breakdown[0],
        folded("Where they differ", [*breakdown[1:], tensors, alike_line(comparison)]),
        "\n".join(f"* {note}" for note in notes_on(comparison)),
        verdict_line(comparison),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
