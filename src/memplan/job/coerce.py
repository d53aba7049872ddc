"""A written value, from whatever format, to the type of its field."""

from __future__ import annotations

import math
import re
from typing import Any

from memplan.job.fields import Field
from memplan.job.parse import Block
from memplan.job.problems import Invalid, listed, shorten
from memplan.job.targets import is_pattern

_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_KIND_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "`true` or `false`",
    "str": "text",
    "ints": "a list of whole numbers",
    "strs": "a list of names",
}


def coerce(field: Field, value: Any) -> Any:
    """
    `value` as the field's own type, within its choices and bounds.

    Raises:
        Invalid: it is something else; the message continues the field's name.
    """
    if value is None or (field.nullable and isinstance(value, str) and value.lower() in ("none", "null")):
        return _null(field)
    if isinstance(value, str) and not value.strip():
        raise Invalid("is empty", hint=_advice(field))
    if isinstance(value, Block) or (isinstance(value, (list, tuple)) and not field.list_kind):
        raise _wrong_kind(field, "a mapping" if isinstance(value, Block) else f"the list `{shorten(value)}`")
    if field.list_kind:
        return _list_or_word(field, value)
    result = _scalar(field, field.kinds[0], value)
    _check_choice(field, result)
    _check_bounds(field, result)
    return result


def _null(field: Field) -> None:
    if not field.nullable:
        raise Invalid("is empty", hint=_advice(field))


def _list_or_word(field: Field, value: Any) -> Any:
    words = field.choices or ()
    if value in words:
        return value
    if field.patterns and isinstance(value, str) and is_pattern(value):
        return _pattern(value)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    elif not isinstance(value, (list, tuple)):
        value = [value]
    if any(part in words for part in value):
        raise Invalid(
            f"is `{shorten(value)}`, which mixes a word for many into a list",
            hint=f"write {listed(words)} alone, or list names only",
        )
    kind = "int" if field.list_kind == "ints" else "str"
    try:
        items = tuple(_scalar(field, kind, part) for part in value)
    except Invalid:
        raise _wrong_kind(field, f"`{shorten(value)}`") from None
    if "" in items:
        raise Invalid("has an empty name in its list", hint="remove it, or the comma too many")
    return items


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        message = f"is `{shorten(text)}`, a pattern that Python's `re` cannot read: {error.msg}"
        raise Invalid(message, hint="write one such as `.*\\.(q|v)_proj`, or a list of names") from None
    return text


def _scalar(field: Field, kind: str, value: Any) -> Any:
    if isinstance(value, (Block, list, tuple)) or value is None:
        raise _wrong_kind(field, f"`{shorten(value)}`")
    try:
        if kind == "int":
            return _int(value)
        if kind == "float":
            return _float(value)
        if kind == "bool":
            return value if isinstance(value, bool) else _BOOLS[value.lower()]
        if isinstance(value, bool):
            raise ValueError
        return str(value)
    except (ValueError, OverflowError, KeyError, AttributeError):
        raise _wrong_kind(field, f"`{shorten(value)}`") from None


def _int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    number = _float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _float(value: Any) -> float:
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _check_choice(field: Field, value: Any) -> None:
    if field.choices and value not in field.choices:
        words = [choice for choice in field.choices if choice is not None]
        null = " or null" if field.nullable else ""
        raise Invalid(
            f"cannot be `{shorten(value)}`", hint=f"{_likely(value, words)}choose {listed(words)}{null}"
        )


def _check_bounds(field: Field, value: Any) -> None:
    if isinstance(value, str):
        return
    if field.minimum is not None:
        if field.exclusive and value <= field.minimum:
            raise Invalid(f"is {value} but must be above {field.minimum}", hint=_advice(field))
        if value < field.minimum:
            raise Invalid(f"is {value} but must be at least {field.minimum}", hint=_advice(field))
    if field.below is not None and value >= field.below:
        raise Invalid(f"is {value} but must be below {field.below}", hint=_advice(field))


def _wrong_kind(field: Field, found: str) -> Invalid:
    kinds = [_KIND_NAMES[kind] for kind in field.kinds if kind != "null"]
    if field.list_kind and field.choices:
        pattern = ["a pattern"] if field.patterns else []
        kinds = [listed(field.choices), *pattern, _KIND_NAMES[field.list_kind]]
    return Invalid(f"must be {' or '.join(kinds)}, not {found}", hint=_advice(field))


def _advice(field: Field) -> str:
    if field.choices and not field.list_kind:
        return "choose " + listed([choice for choice in field.choices if choice is not None])
    if field.required:
        return f"e.g. `{field.name}: gpt2`"
    if field.default is None:
        return f"leave `{field.name}` out, or set it: {field.doc}"
    return f"e.g. `{field.name}: {shorten(field.default)}`, the default: {field.doc}"


def _likely(value: str, words: list[str]) -> str:
    import difflib

    folded = {str(word).lower(): word for word in words}
    close = difflib.get_close_matches(str(value).lower(), folded, n=1, cutoff=0.6)
    return f"did you mean `{folded[close[0]]}`? If not, " if close else ""
