"""Import the python modules beside a run's configuration, under names unique to the run.

The folders that a configuration lists under `python:` form a package, and the package's name holds
their paths: `shardmap.jobs.modules./home/me/gradients.digits` is `/home/me/gradients/digits.py`.
Two runs may therefore have modules of the same name in one process, and any process that sees the
same files (a worker, a child) can unpickle what such a module defines.

Inside these modules, `import other` and `from other import name` find a module of the same run
first, as they would in a script; so does `from .other import name`.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote

__path__: list[str] = []
"""Makes this module a package for the import system; `_Finder` finds its modules."""

_PREFIX = f"{__name__}."
_BETWEEN = ":"


def folder_of(name: str, folders: Sequence[Path]) -> Path | None:
    """The first of a run's folders that holds the module `name`.

    `NAME.py` is preferred to installed modules, as beside a script. A package, a folder
    with an `__init__.py`, is used only if python itself finds none of that name, so that a
    configuration in the root of a repository does not load its package twice.

    Args:
        name: The first component of an import path.
        folders: The run's `python:` folders.

    Returns:
        None if the module is not in them, and is imported as usual.
    """
    for folder in folders:
        if (folder / f"{name}.py").is_file():
            return folder
    for folder in folders:
        if (folder / name / "__init__.py").is_file() and importlib.util.find_spec(name) is None:
            return folder
    return None


def import_module(name: str, folders: Sequence[Path]) -> ModuleType:
    """Import a module from a run's folders if one of them holds it, otherwise as usual.

    Args:
        name: `digits`, or `package.module`.
        folders: The run's `python:` folders.

    Raises:
        ImportError: There is no such module, or it imports one that is missing.
    """
    if folder_of(name.partition(".")[0], folders) is None:
        return importlib.import_module(name)
    importlib.invalidate_caches()  # the file may be newer than the cached listing of its folder
    return importlib.import_module(f"{_package(folders)}.{name}")


def _package(folders: Sequence[Path]) -> str:
    """The name of the package formed by a run's folders; a dot would end the component."""
    quoted = [quote(str(folder)).replace(".", "%2E") for folder in folders]
    return _PREFIX + _BETWEEN.join(quoted)


def _folders(package: str) -> list[Path]:
    """The folders in a package's name."""
    return [Path(unquote(part)) for part in package.removeprefix(_PREFIX).split(_BETWEEN)]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the packages formed by folders, and the modules in them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a module, if its name is one of these packages."""
        if not fullname.startswith(_PREFIX):
            return None
        if "." not in fullname.removeprefix(_PREFIX):
            spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(folder) for folder in _folders(fullname)]
            return spec
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a module's source so that its import statements see the modules of its run first."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the module builtins with an `__import__` of its own, then run it.

        `exec` documents that the code it runs takes its builtins from there.
        """
        package = _PREFIX + module.__name__.removeprefix(_PREFIX).partition(".")[0]
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": _import_for(package)}
        super().exec_module(module)


def _import_for(package: str) -> Callable[..., Any]:
    """The `__import__` of the modules in a package formed by folders."""
    folders = _folders(package)

    def import_(
        name: str,
        globals: dict[str, Any] | None = None,
        locals: dict[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level or folder_of(top, folders) is None:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        inside = f"{package}.{name}"
        if fromlist:
            return builtins.__import__(inside, globals, locals, fromlist, 0)
        importlib.import_module(inside)
        return sys.modules[f"{package}.{top}"]  # `import a.b` binds a

    return import_


sys.meta_path.insert(0, _Finder())
