"""
The JSON schemas of `--format json`, made from the dataclasses behind it, so that the two cannot drift apart.
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
    return _document("memplan result", properties, definitions)


def diff_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the object that `diff` prints with `--format json`."""
    from memplan.snapshot import compare
    from memplan.snapshot.diff import TensorChange

    definitions: dict[str, Any] = {}
    amounts, changes = (
        {"type": "array", "items": _with_change(cls, definitions)} for cls in (compare.Amount, TensorChange)
    )
    side = {
        "source": _SIMPLE[str],
        **{
            name: _schema(hint, definitions)
            for name, hint in typing.get_type_hints(Result).items()
            if name in ("engine", "peak", "capacity", "verdict", "warnings")
        },
    }
    properties = {
        "schema_version": {"const": compare.SCHEMA_VERSION},
        "a": _closed(side),
        "b": _closed(side),
        "fields": {"type": "object", "additionalProperties": {"type": "array", "minItems": 2, "maxItems": 2}},
        "totals": amounts,
        "categories": amounts,
        "phases": amounts,
        "alike": _closed(dict.fromkeys(("bytes", "count", "by_size"), _SIMPLE[int])),
        "tensors": changes,
    }
    return _document("memplan diff", properties, definitions)


def _document(title: str, properties: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "description": "Sizes are in bytes, per GPU unless a name says otherwise.",
        **_closed(properties),
        "$defs": definitions,
    }


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these properties, all of them and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _with_change(cls: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    return _closed({**_object(cls, definitions)["properties"], "change_bytes": _SIMPLE[int]})


def _object(cls: Any, definitions: dict[str, Any], names: tuple[str, ...] | None = None) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    names = names or tuple(field.name for field in dataclasses.fields(cls))
    return _closed({name: _schema(hints[name], definitions) for name in names})


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
