"""
Text of a job file to `Entry`s, without knowing what any field means.

A YAML scalar stays the text that was written, because the field decides what it is: `1e-4` is a string to
YAML 1.1 and a learning rate to us, `010` would be 8, and `1:30` would be 90.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from memplan.errors import JobError

if TYPE_CHECKING:
    import yaml

_NULLS = ("", "~", "null", "Null", "NULL")
_MAX_DEPTH = 4
"""No field lies deeper than this; a bound also keeps anchors that refer to themselves finite."""
_MAX_NESTING = 100


class Entry(NamedTuple):
    """One `key: value` line. `line` counts from 1; None where the format does not tell."""

    key: str
    value: Any
    line: int | None


class Block(NamedTuple):
    """A mapping, with repeated keys still in it."""

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        return "{" + ", ".join(f"{entry.key}: ..." for entry in self.entries) + "}"


def parse(text: str, *, suffix: str, name: str) -> Block:
    """
    The entries of a job file: JSON or TOML by suffix, YAML otherwise.

    Raises:
        JobError: the text is empty, is not of that format, or is not a mapping at the top.
    """
    if not text.strip():
        raise JobError(f"{name} is empty", hint="a job needs at least one line, e.g. `model: gpt2`")
    if suffix == ".json":
        value = _parse_json(text, name)
    elif suffix == ".toml":
        value = _parse_toml(text, name)
    else:
        value = parse_yaml(text, name)
    if value is None:
        raise JobError(
            f"{name} holds nothing but comments", hint="a job needs at least one line, e.g. `model: gpt2`"
        )
    if not isinstance(value, Block):
        kind = "a list" if isinstance(value, list) else "a single value"
        raise JobError(
            f"{name} holds {kind} where the fields of a job should be",
            hint="write one `field: value` per line, e.g. `model: gpt2`",
        )
    return value


def parse_yaml(text: str, name: str) -> Any:
    """
    A YAML document as `Block`, list, text or None.

    Raises:
        JobError: it is not YAML, or not one document.
    """
    import yaml

    loader_class = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_depth(text, loader_class)
        loader = loader_class(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        return _from_node(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        _refuse("YAML", name, mark.line + 1 if mark else None, error.problem or "cannot be read")
    except yaml.YAMLError:
        _refuse("YAML", name, None, "it holds characters that YAML does not allow")
    except RecursionError:
        _refuse("YAML", name, None, "it is nested too deeply")


def _check_depth(text: str, loader_class: Any) -> None:
    """Refuse what would overflow the C stack: PyYAML composes nested nodes by recursion, without a limit."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=loader_class):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_NESTING:
            raise RecursionError


def _from_node(node: yaml.Node | None, depth: int = 0) -> Any:
    import yaml

    if depth > _MAX_DEPTH:
        return "..."
    if isinstance(node, yaml.MappingNode):
        return Block(
            tuple(
                Entry(
                    str(key.value) if isinstance(key, yaml.ScalarNode) else "?",
                    _from_node(value, depth + 1),
                    key.start_mark.line + 1,
                )
                for key, value in node.value
            )
        )
    if isinstance(node, yaml.SequenceNode):
        return [_from_node(item, depth + 1) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        plain = not node.style
        return None if plain and node.value in _NULLS else node.value
    return None


def _parse_json(text: str, name: str) -> Any:
    import json

    try:
        return json.loads(text, object_pairs_hook=_block)
    except json.JSONDecodeError as error:
        _refuse("JSON", name, error.lineno, error.msg)
    except ValueError as error:
        _refuse("JSON", name, None, str(error))
    except RecursionError:
        _refuse("JSON", name, None, "it is nested too deeply")


def _parse_toml(text: str, name: str) -> Any:
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        return _from_python(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        _refuse("TOML", name, None, str(error))
    except RecursionError:
        _refuse("TOML", name, None, "it is nested too deeply")


def _block(pairs: list[tuple[str, Any]]) -> Block:
    return Block(tuple(Entry(key, value, None) for key, value in pairs))


def _from_python(value: Any) -> Any:
    if isinstance(value, dict):
        return _block([(key, _from_python(inner)) for key, inner in value.items()])
    if isinstance(value, list):
        return [_from_python(item) for item in value]
    return value


def _refuse(language: str, name: str, line: int | None, reason: str) -> NoReturn:
    where = f"{name} line {line}" if line else name
    remedy = {
        "YAML": "write one `field: value` per line, indent with spaces, put text with `:` or `#` in quotes",
        "JSON": "check quotes, commas and brackets there, or write the job as YAML",
        "TOML": "check quotes and brackets there, or write the job as YAML",
    }
    raise JobError(f"{where} is not valid {language}: {reason}", hint=remedy[language]) from None
