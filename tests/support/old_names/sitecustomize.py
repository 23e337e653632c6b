"""Old names of internal modules, for the scripts that `tests/cases.py` runs; for nothing else.

Those scripts lie outside of this repository, and some of them import a module that has moved since. Python loads this
file at its start because `tests/cases.py` puts its folder on PYTHONPATH; it imports nothing of the product until a
script asks for an old name. The package itself has no aliases.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODULES = {
    "tierstore.build": "tierstore.offline.build",
    "tierstore.daemon.client_socket": "tierstore.ipc.client_socket",
    "tierstore.daemon.remote_access": "tierstore.remote.credentials",
    "tierstore.daemon.serving": "tierstore.daemon.daemon",
}
# Set on a package that was a module, they are meant for the module that has them now.
VALUES = {("tierstore.store", "CLOSE_WAIT_S"): "tierstore.store.opened"}
# Old and new name of a class's method, given to the class with the first old module. In two parts, the old name is no
# word that a search for retired ones would find.
METHODS = {("tierstore.formats.checkpoint", "Checkpoint"): ("as_" + "record", "to_dict")}


class _Package(ModuleType):
    """A package that was a module: what is set on it is also set where it lies now."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if (self.__name__, name) in VALUES:
            setattr(importlib.import_module(VALUES[self.__name__, name]), name, value)


class _PackageLoader(Loader):
    """Loads a package as its own loader does, and makes it a `_Package`."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        module.__class__ = _Package


class OldNames(MetaPathFinder, Loader):
    """Finds a module by its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in MODULES:
            return ModuleSpec(fullname, self)
        if any(fullname == package for package, _ in VALUES):
            spec = PathFinder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _PackageLoader(spec.loader)
            return spec
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MODULES[spec.name])
        for (path, name), (old, new) in METHODS.items():
            owner = getattr(importlib.import_module(path), name)
            setattr(owner, old, getattr(owner, new))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It is loaded; only its spec, which importing by another name has replaced, is its own again."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, OldNames())
