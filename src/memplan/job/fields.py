"""The fields of a job as one flat table, read off the dataclasses of `spec.py`."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, NamedTuple

from memplan.job.spec import Job

_KINDS = {
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "None": "null",
    "tuple[int, ...]": "ints",
    "tuple[str, ...]": "strs",
}


class Field(NamedTuple):
    """One leaf of the job, e.g. `lora.rank`."""

    name: str
    """Dotted, e.g. `lora.rank`."""
    kinds: tuple[str, ...]
    """What it may hold: `int`, `float`, `bool`, `str`, `ints`, `strs`, `null`."""
    default: Any
    """`dataclasses.MISSING` where the job has to say it."""
    doc: str
    choices: tuple[Any, ...] | None
    minimum: float | None
    exclusive: bool
    below: float | None
    patterns: bool
    """Whether a text in place of the list may be a pattern of Python's `re`."""

    @property
    def required(self) -> bool:
        """Whether a job must give it."""
        return self.default is dataclasses.MISSING

    @property
    def nullable(self) -> bool:
        """Whether null is a value."""
        return "null" in self.kinds

    @property
    def list_kind(self) -> str | None:
        """`ints` or `strs` where it may hold a list; None where not."""
        return next((kind for kind in self.kinds if kind in ("ints", "strs")), None)


@cache
def job_fields() -> dict[str, Field]:
    """Every leaf field by dotted name, in the order of the spec."""
    table: dict[str, Field] = {}
    for field in dataclasses.fields(Job):
        if field.name in job_sections():
            for inner in dataclasses.fields(job_sections()[field.name]):
                name = f"{field.name}.{inner.name}"
                table[name] = _leaf(name, inner)
        else:
            table[field.name] = _leaf(field.name, field)
    return table


@cache
def job_sections() -> dict[str, type]:
    """The dataclass of every section (`lora`, `parallel` ...), in the order of the spec."""
    return {
        field.name: field.default_factory  # type: ignore[misc]
        for field in dataclasses.fields(Job)
        if field.default_factory is not dataclasses.MISSING
    }


def field_value(job: Job, name: str) -> Any:
    """
    The value of a field by its dotted name.

    >>> field_value(Job(model="gpt2"), "lora.rank")
    16
    """
    value: Any = job
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _leaf(name: str, field: dataclasses.Field[Any]) -> Field:
    metadata = field.metadata
    kinds = tuple(_KINDS[part] for part in str(field.type).split(" | "))
    return Field(
        name=name,
        kinds=kinds,
        default=field.default,
        doc=metadata["doc"],
        choices=metadata["choices"],
        minimum=metadata["minimum"],
        exclusive=metadata["exclusive"],
        below=metadata["below"],
        patterns=metadata["patterns"],
    )
