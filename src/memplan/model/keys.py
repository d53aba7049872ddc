"""Reading a `config.json`: typed access to its keys, with errors that name the key, its value and what was expected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from memplan.errors import ModelError, UnknownModel

_REQUIRED: Any = object()

PROGRAMS_HINT = "`memplan models` lists the models that are known by name, and whether they can be planned"


class Keys:
    """Reads one config; every failure names the key, its value and what was expected."""

    def __init__(self, config: Mapping[str, Any], name: str, class_name: str) -> None:
        self._config = config
        self._name = name
        self._class_name = class_name

    def size(self, *keys: str, default: Any = _REQUIRED) -> int:
        """A positive integer under the first of `keys` that is present; null counts as absent."""
        value = next((self._config[key] for key in keys if self._config.get(key) is not None), default)
        if value is _REQUIRED:
            raise self._error(f"has no `{keys[0]}`")
        return self._positive(keys[0], value)

    def optional_size(self, key: str, default: int | None) -> int | None:
        """As `size`, but an explicit null means None and not the default."""
        value = self._config.get(key, default)
        return None if value is None else self._positive(key, value)

    def count(self, key: str, default: int) -> int:
        """An integer from 0 on."""
        value = self._config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._expected(key, value, "an integer from 0 on")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._config.get(key, default)
        if not isinstance(value, bool):
            raise self._expected(key, value, "true or false")
        return value

    def probability(self, key: str, default: float) -> float:
        value = self._config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self._expected(key, value, "a number in [0, 1)")
        return float(value)

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        """A nested object; None where there is none."""
        value = self._config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._expected(key, value, "an object")
        return value

    def share(self, key: str, default: float) -> float:
        """A number above 0 and up to 1."""
        value = self._config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise self._expected(key, value, "a number above 0 and up to 1")
        return float(value)

    def optional_number(self, key: str, default: float | None) -> float | None:
        """A positive number; an explicit null means None and not the default."""
        value = self._config.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self._expected(key, value, "a positive number")
        return float(value)

    def section(self, *names: str) -> Keys:
        """The keys of the first of these sections that is there; of an empty one where none is."""
        value: Any = next((self._config[name] for name in names if self._config.get(name) is not None), {})
        if not isinstance(value, Mapping):
            raise self._expected(names[0], value, "a section")
        return Keys(value, self._name, self._class_name)

    def text(self, key: str, default: str) -> str:
        value = self._config.get(key, default)
        if not isinstance(value, str):
            raise self._expected(key, value, "a name")
        return value

    def layer_types(self, num_hidden_layers: int) -> tuple[str, ...] | None:
        """The kind of attention of each block, None where the config leaves it to other keys."""
        value = self._config.get("layer_types")
        if value is None:
            return None
        known = ("full_attention", "sliding_attention")
        if (
            not isinstance(value, list)
            or len(value) != num_hidden_layers
            or any(k not in known for k in value)
        ):
            raise self._error(f"has `layer_types` that are no list of {num_hidden_layers} of {known}")
        return tuple(value)

    def must_divide(self, divisor_key: str, divisor: int, key: str, value: int) -> None:
        if value % divisor:
            raise self._error(f"has `{key}: {value}`, which is no multiple of `{divisor_key}: {divisor}`")

    def must_be_even(self, key: str, value: int) -> None:
        """Rotary embeddings turn pairs of channels."""
        if value % 2:
            raise self._error(f"has `{key}: {value}`, where rotary embeddings need an even number")

    def must_not_exceed(self, key: str, value: int, limit_key: str, limit: int) -> None:
        if value > limit:
            raise self._error(f"has `{key}: {value}`, which is more than `{limit_key}: {limit}`")

    def must_be(self, key: str, value: Any) -> None:
        """Other values are variants of the class that the shape writer does not cover; absent counts as `value`."""
        given = self._config.get(key)
        if given is not None and given != value:
            raise UnknownModel(
                f"{self._name} has `{key}: {json.dumps(given)}`, a variant of {self._class_name} that has no program",
                hint=PROGRAMS_HINT,
            )

    def refuse(self, key: str) -> None:
        """A variant of the class that the shape writer does not cover."""
        if self._config.get(key):
            message = f"{self._name} has `{key}: true`, a variant of {self._class_name} that has no program"
            raise UnknownModel(message, hint=PROGRAMS_HINT)

    def _positive(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._expected(key, value, "a positive integer")
        return value

    def _expected(self, key: str, value: Any, what: str) -> ModelError:
        return self._error(f"has `{key}: {json.dumps(value)}`, where {what} was expected")

    def _error(self, what: str) -> ModelError:
        return ModelError(
            f"The config of {self._name} ({self._class_name}) {what}",
            hint="Compare it with the config.json of the model on the hub",
        )
