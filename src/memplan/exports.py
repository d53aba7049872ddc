"""What a package exports, loaded on first use: importing `memplan` or a room of it brings no torch, and little else."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_exports(package: str, names: dict[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """
    The `__getattr__` of a package (https://peps.python.org/pep-0562).

    Args:
        package: its `__name__`.
        names: what it exports, by the module of it that holds the names.

    Raises:
        AttributeError: by what is returned, for any other name.
    """
    modules = {name: module for module, held in names.items() for name in held}

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module `{package}` has no attribute `{name}`")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return load
