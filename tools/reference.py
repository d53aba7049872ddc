"""
`python -m tools.reference` writes the generated parts of README.md and docs/; `--check` says whether they are
up to date and writes nothing.

Two kinds of parts are generated: the outputs in ```console blocks (`consoles.py`), and what stands between
`<!-- generated: NAME -->` and `<!-- end -->`, where NAME is one of `REGIONS`. Everything else is written by
hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memplan.cli.app import COMMANDS
from memplan.job.aliases import ALIASES
from memplan.job.fields import Field, job_fields, job_sections
from memplan.job.ready import list_jobs
from memplan.tape.scratch import SOURCES
from tools import consoles

ROOT = Path(__file__).parent.parent

_REGION = re.compile(
    r"(?P<begin>^<!-- generated: (?P<name>[a-z-]+) -->\n).*?(?P<end>^<!-- end -->$)",
    re.MULTILINE | re.DOTALL,
)


def main(arguments: Sequence[str]) -> int:
    """Refresh the pages, or with `--check` only compare them; 1 if a page is not up to date."""
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        fresh = render(text)
        if fresh == text:
            continue
        stale.append(page.relative_to(ROOT))
        if "--check" not in arguments:
            page.write_text(fresh, encoding="utf-8")
    for name in stale:
        print(f"{'out of date' if '--check' in arguments else 'written'}: {name}")
    if stale and "--check" in arguments:
        print("\nhint: `python -m tools.reference` writes them anew")
        return 1
    return 0


def pages() -> list[Path]:
    """README.md and the pages of docs/ that this tool looks after."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """A page with its generated parts made anew."""
    text = _REGION.sub(
        lambda match: f"{match['begin']}{REGIONS[match['name']]().rstrip()}\n{match['end']}", text
    )
    return consoles.refresh(text)


def scratch_region() -> str:
    """What kernels take inside one operation, with source and status."""
    rows = ["| operation | takes | status | source |", "|---|---|---|---|"]
    for name, source in SOURCES.items():
        operation = ", ".join(f"`{operator}`" for operator in source.operators) or name
        rows.append(f"| {operation} | {source.takes} | {source.status} | {source.where} |")
    return "\n".join(rows)


def fields_region() -> str:
    """Every field of the job by section: type, default, meaning."""
    parts = ["### Top level", "", *_field_table([name for name in job_fields() if "." not in name])]
    for section, cls in job_sections().items():
        doc = (cls.__doc__ or "").strip()
        names = [name for name in job_fields() if name.startswith(f"{section}.")]
        parts += ["", f"### `{section}`", "", doc, "", *_field_table(names)]
    return "\n".join(parts)


def _field_table(names: Sequence[str]) -> Iterator[str]:
    yield "| field | takes | default | meaning |"
    yield "|---|---|---|---|"
    for name in names:
        field = job_fields()[name]
        cells = (f"`{name}`", _takes(field), _default(field), field.doc)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _takes(field: Field) -> str:
    lists = {"ints": "a list of numbers", "strs": "a list of names"}
    kinds = {"int": "whole number", "float": "number", "bool": "`true` or `false`", "str": "text"}
    words = []
    if field.choices:
        words += [f"`{_yaml(choice)}`" for choice in field.choices if choice is not None]
    else:
        words += [kinds[kind] for kind in field.kinds if kind in kinds]
    if field.patterns:
        words.append("a pattern")
    if field.list_kind:
        words.append(lists[field.list_kind])
    if field.nullable:
        words.append("`null`")
    return ", ".join(words) + _bounds(field)


def _bounds(field: Field) -> str:
    bounds = []
    if field.minimum is not None:
        bounds.append(f"{'above' if field.exclusive else 'at least'} {field.minimum:g}")
    if field.below is not None:
        bounds.append(f"below {field.below:g}")
    return f" ({', '.join(bounds)})" if bounds else ""


def _default(field: Field) -> str:
    return "required" if field.required else f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


def aliases_region() -> str:
    """Names of other tools, by the field that they set."""
    names: dict[str, list[str]] = {}
    for alias, target in ALIASES.items():
        if "." not in alias:
            names.setdefault(target.field, []).append(f"`{alias}`")
    lines = ["| field | also known as |", "|---|---|"]
    lines += [f"| `{field}` | {', '.join(names[field])} |" for field in job_fields() if field in names]
    return "\n".join(lines)


def jobs_region() -> str:
    """The ready jobs."""
    lines = ["| name | what it is |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {description} |" for name, description in list_jobs())])


def accuracy_region() -> str:
    """How many runs were compared, and the table in short, from what `python -m benchmarks.accuracy` wrote."""
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    section = page.partition("## In short\n")[2].partition("\n## ")[0].strip().splitlines()
    count = section[0].partition(";")[0]
    return "\n".join([f"{count}.", "", *(line for line in section if line.startswith("|"))])


def commands_region() -> str:
    """`--help` of every command; the flags of the job are printed once, with the first."""
    parts: list[str] = []
    for number, name in enumerate(COMMANDS):
        lines = consoles.run(f"memplan {name} --help")
        if number:
            lines = _without_job_flags(lines)
        parts += [f"## memplan {name}", "", "```text", *lines, "```", ""]
    return "\n".join(parts)


def _without_job_flags(lines: list[str]) -> list[str]:
    """The help of a command whose job flags, from `--model` to the last of its fields, are left out."""
    first = next((index for index, line in enumerate(lines) if line.startswith("  --model ")), None)
    if first is None:
        return lines
    last = next(index for index, line in enumerate(lines) if line.startswith("  -h, --help"))
    return [*lines[:first], "  ... and the flags of the job, as in memplan estimate", *lines[last:]]


REGIONS: dict[str, Callable[[], str]] = {
    "fields": fields_region,
    "aliases": aliases_region,
    "accuracy": accuracy_region,
    "jobs": jobs_region,
    "commands": commands_region,
    "scratch": scratch_region,
}
"""Generated regions by name."""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
