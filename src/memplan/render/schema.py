"""
The JSON schema of `--format json`, made from the dataclasses behind it, so that the two cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from memplan.budget.result import SCHEMA_VERSION, Result

_SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
}


def result_schema() -> dict[str, Any]:
    """
    JSON schema (draft 2020-12) of the object that `estimate`, `fit` and `preflight` print with `--format
    json`.
    """
    from memplan.fit.frontier import Frontier
    from memplan.preflight.run import Preflight

    definitions: dict[str, Any] = {}
    schema = _object(Result, definitions)
    properties = {
        "schema_version": {"const": SCHEMA_VERSION},
        **schema["properties"],
        "preflight": {"anyOf": [_object(Preflight, definitions, Preflight.JSON_FIELDS), {"type": "null"}]},
        "frontier": {"anyOf": [_object(Frontier, definitions), {"type": "null"}]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "memplan result",
        "description": "Sizes are in bytes, per GPU unless a name says otherwise.",
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        "$defs": definitions,
    }


def _object(cls: Any, definitions: dict[str, Any], names: tuple[str, ...] | None = None) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    names = names or tuple(field.name for field in dataclasses.fields(cls))
    return {
        "type": "object",
        "properties": {name: _schema(hints[name], definitions) for name in names},
        "required": list(names),
        "additionalProperties": False,
    }


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if dataclasses.is_dataclass(hint):
        name = hint.__name__  # type: ignore[union-attr]
        if name not in definitions:
            definitions[name] = {}
            definitions[name] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{name}"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(argument, definitions) for argument in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is tuple:
        items = [_schema(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    raise TypeError(f"no JSON schema for {hint}")
