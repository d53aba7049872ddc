"""
Lazy modules: their code runs when they are asked for something that they have no answer for.

`importlib.util.LazyLoader` runs a module at the first look at it; these can answer for a few names before.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Changes = Mapping[str, Callable[[ModuleType], None]]
"""By module, what changes it as soon as it has run."""


@dataclass(frozen=True)
class Answers:
    """What a module says without running."""

    names: Mapping[str, Any] = field(default_factory=dict)
    to: str | None = None
    """The module that is answered; None for all. Others make the module run."""


class LazyModule(ModuleType):
    """A module that has not run yet. It runs in this very object, so that whoever has it has the real one then."""

    def __getattr__(self, name: str) -> Any:
        loader = _loader_of(self)
        if loader is not None and name in loader.answers.names:
            asker = sys._getframe(1).f_globals.get("__name__")
            answer = loader.answers.names[name]
            # While it runs, its own code may ask for a submodule of that name.
            is_asked = callable(answer) or not loader.is_running
            if is_asked and loader.is_answering and loader.answers.to in (None, asker):
                return answer
        is_running = loader is not None and loader.is_running
        if is_running or (name.startswith("__") and name not in ("__all__", "__version__")):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        run(self)
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        run(self)
        return dir(self)


class _Later(Loader):
    """Makes a lazy module of what another loader would run."""

    def __init__(self, original: Loader, answers: Answers) -> None:
        self.original = original
        self.answers = answers
        self.is_answering = True
        self.is_running = False
        """What code that runs because of it asks meanwhile is answered as before."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return LazyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


class _Changed(Loader):
    """Runs a module, and changes it before anyone sees it."""

    def __init__(self, original: Loader, change: Callable[[ModuleType], None]) -> None:
        self.original = original
        self.change = change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.original.exec_module(module)
        self.change(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


class _Finder(MetaPathFinder):
    def __init__(self, lazy: Mapping[str, Answers], changes: Changes) -> None:
        self.lazy = lazy
        self.changes = changes

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.lazy and name not in self.changes:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        if name in self.lazy:
            spec.loader = _Later(spec.loader, self.lazy[name])
        else:
            spec.loader = _Changed(spec.loader, self.changes[name])
        return spec


def _loader_of(module: ModuleType) -> _Later | None:
    loader = None if module.__spec__ is None else module.__spec__.loader
    return loader if isinstance(loader, _Later) else None


def run(module: ModuleType) -> None:
    """Run the code of a lazy module, if it has not run."""
    loader = _loader_of(module)
    if loader is not None and type(module) is LazyModule and not loader.is_running:
        loader.is_running = True
        try:
            loader.original.exec_module(module)
        finally:
            loader.is_running = False
        module.__class__ = ModuleType  # type: ignore[assignment]


def asked(name: str) -> ModuleType:
    """The module of that name, run."""
    module = importlib.import_module(name)
    run(module)
    return module


@contextmanager
def lazily(lazy: Mapping[str, Answers], changes: Changes) -> Iterator[None]:
    """
    Within, modules that nobody has imported before are lazy, or changed as soon as they have run. Afterwards lazy
    modules answer nothing any more: whatever is asked of them makes them run.
    """
    finder = _Finder(lazy, changes)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in lazy:
            loader = _loader_of(sys.modules.get(name, sys))
            if loader is not None:
                loader.is_answering = False
