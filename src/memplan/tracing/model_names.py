"""
The names of transformers' models, without reading the files of all of them.

`import transformers` and `import transformers.models` read two thousand files each, to learn which module a name is in.
Names begin with that of their model's folder as a rule, so that one folder is enough; for any other name all are read.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORT_UTILS = "transformers.utils.import_utils"


class _Unread(dict[frozenset[str], dict[str, set[str]]]):
    """The structure of the folder of all models, of which nothing has been read: no names."""

    def __init__(self, folder: Path, prefix: str | None) -> None:
        super().__init__({frozenset(): {}})
        self.folder = folder
        self.prefix = prefix

    def folders(self) -> list[str]:
        """One for each model."""
        return [entry.name for entry in os.scandir(self.folder) if entry.is_dir()]

    def under(self, folder: str) -> str:
        """What modules of this folder begin with, as the whole structure calls them."""
        return folder if self.prefix is None else f"{self.prefix}.{folder}"


def read_on_demand(module: ModuleType) -> None:
    """Change transformers/utils/import_utils.py."""
    if not hasattr(module, "define_import_structure") or not hasattr(module, "_LazyModule"):
        return
    read = module.define_import_structure
    original = module._LazyModule

    def define_import_structure(module_path: Any, prefix: str | None = None) -> Any:
        folder = Path(module_path)
        folder = folder.parent if folder.suffix == ".py" else folder
        if (folder.name, folder.parent.name) != ("models", "transformers"):
            return read(module_path, prefix)
        return _Unread(folder, prefix)

    class LazyModule(original):  # type: ignore[misc, valid-type]
        """Reads what it is asked for."""

        def __init__(
            self, name: str, module_file: str, import_structure: Any, *args: Any, **kwargs: Any
        ) -> None:
            super().__init__(name, module_file, import_structure, *args, **kwargs)
            if not isinstance(import_structure, _Unread):
                return
            self._unread = import_structure
            self._arguments = (name, module_file, args, kwargs)
            if import_structure.prefix is not None:
                self._modules.add(import_structure.prefix)
            del self.__all__

        def __getattr__(self, name: str) -> Any:
            unread = vars(self).get("_unread")
            if unread is not None and self._is_unknown(name):
                self._read_folders(name)
                if self._is_unknown(name):
                    self._read_all()
            return super().__getattr__(name)

        def _is_unknown(self, name: str) -> bool:
            if name.startswith("__"):
                return name == "__all__"
            if (Path(self.__path__[0]) / f"{name}.py").exists():
                return False  # a module that is about to be imported
            known = (self._class_to_module, self._modules, self._objects, self._object_missing_backend)
            return not any(name in names for names in known)

        def _read_folders(self, name: str) -> None:
            """Those that the name begins with."""
            unread = self._unread
            module_name, module_file, args, kwargs = self._arguments
            for folder in unread.folders():
                if not name.lower().startswith(folder.replace("_", "")):
                    continue
                structure = read(str(unread.folder / folder), unread.under(folder))
                part = original(module_name, module_file, structure, *args, **kwargs)
                self._modules |= part._modules
                self._class_to_module.update(part._class_to_module)
                self._object_missing_backend.update(part._object_missing_backend)
                self._import_structure.update(part._import_structure)

        def __dir__(self) -> list[str]:
            if "_unread" in vars(self):
                self._read_all()
            return list(super().__dir__())

        def _read_all(self) -> None:
            name, module_file, args, kwargs = self._arguments
            unread = self._unread
            del self._unread
            structure = read(str(unread.folder), unread.prefix)
            merged = {backends: {**modules} for backends, modules in structure.items()}
            merged.setdefault(frozenset(), {}).update(unread[frozenset()])
            original.__init__(self, name, module_file, merged, *args, **kwargs)

    vars(module).update(define_import_structure=define_import_structure, _LazyModule=LazyModule)
