"""The objects that functions, containers and weak proxies hold."""

from __future__ import annotations

import types
from typing import cast


def cells_of(function: types.FunctionType) -> dict[str, object]:
    """The variables that a function closes over."""
    found = {}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not bound
            continue
    return found


def defaults_of(function: types.FunctionType) -> dict[str, object]:
    """The defaults of a function's arguments."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    found = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    return found | (function.__kwdefaults__ or {})


def item_of(container: object, key: object) -> object:
    """An item of a dict, list or tuple; None if there is none, where reading it is an error."""
    try:
        return cast(dict[object, object], container)[key]
    except (LookupError, TypeError):
        return None


def behind(proxy: object) -> object:
    """What a `weakref.proxy` refers to; None if it is gone."""
    try:
        return getattr(proxy.__repr__, "__self__", None)
    except ReferenceError:
        return None
