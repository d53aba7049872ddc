"""The JSON schema of the job file, from the fields of the spec."""

from __future__ import annotations

import dataclasses
from typing import Any

from memplan.job.fields import Field, job_fields, job_sections
from memplan.job.spec import Job
from memplan.job.targets import PATTERN

_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "null": "null"}
_ARRAYS: dict[str, dict[str, Any]] = {
    "ints": {"type": "array", "items": {"type": "integer", "minimum": 0}, "uniqueItems": True},
    "strs": {"type": "array", "items": {"type": "string", "minLength": 1}, "uniqueItems": True},
}


def job_schema() -> dict[str, Any]:
    """
    JSON Schema (2020-12) of a job file in memplan's own names, as editors and CI use it.

    It knows single fields: types, choices, bounds, defaults. What they must agree on is for the reader.
    """
    properties: dict[str, Any] = {}
    for field in dataclasses.fields(Job):
        section = job_sections().get(field.name)
        if section is None:
            properties[field.name] = _schema_of(job_fields()[field.name])
        else:
            properties[field.name] = {
                "description": field.metadata["doc"],
                "type": "object",
                "properties": {
                    inner.name: _schema_of(job_fields()[f"{field.name}.{inner.name}"])
                    for inner in dataclasses.fields(section)
                },
                "additionalProperties": False,
            }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "memplan job",
        "description": "One training job: the question that memplan answers",
        "type": "object",
        "properties": properties,
        "required": [name for name, field in job_fields().items() if field.required],
        "additionalProperties": False,
    }


def _patterns(field: Field) -> list[dict[str, Any]]:
    return [{"type": "string", "format": "regex", "pattern": PATTERN}] if field.patterns else []


def _schema_of(field: Field) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": field.doc}
    if field.list_kind:
        array = _ARRAYS[field.list_kind]
        schema |= (
            {"anyOf": [{"enum": list(field.choices)}, *_patterns(field), {**array, "minItems": 1}]}
            if field.choices
            else array
        )
    elif field.choices:
        schema["enum"] = list(field.choices)
    else:
        types = [_TYPES[kind] for kind in field.kinds]
        schema["type"] = types if len(types) > 1 else types[0]
        if "str" in field.kinds:
            schema["minLength"] = 1
        if field.minimum is not None:
            schema["exclusiveMinimum" if field.exclusive else "minimum"] = field.minimum
        if field.below is not None:
            schema["exclusiveMaximum"] = field.below
    if not field.required:
        schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    return schema
