"""The objects that functions, containers and weak proxies hold."""

from __future__ import annotations

import abc
import functools
import threading
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import cast

import torch


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


def own_of(value: object) -> Iterator[Mapping[str, object]]:
    """The dictionaries of an object's own attributes."""
    try:
        local = isinstance(value, threading.local)  # has one in each thread
        own = value.__dict__ if local else object.__getattribute__(value, "__dict__")
    except AttributeError:
        return
    if isinstance(own, Mapping):
        yield own
        if isinstance(value, torch.nn.Module):
            for kind in ("_parameters", "_buffers", "_modules"):
                yield own.get(kind, {})


def slots_of(kind: type) -> Iterator[str]:
    """The names of the attributes that objects of a class have beside their dictionary."""
    for base in kind.__mro__:
        if base.__flags__ & _MADE_BY_PYTHON:
            for name, value in list(vars(base).items()):
                if isinstance(value, types.MemberDescriptorType):
                    yield name


def parts_of(value: object) -> tuple[object, ...]:
    """What a callable other than a function is made of."""
    if isinstance(value, functools.partial):
        return value.func, *value.args, dict(value.keywords)
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, property):
        return (value.fget,)
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, functools.cached_property):
        return (value.func,)
    if isinstance(value, functools.singledispatchmethod):
        return (value.dispatcher,)
    return (getattr(value, "__func__", None),)


def registered_with(kind: type) -> tuple[int, ...]:
    """The classes that `register` has made subclasses of an abstract one, by address."""
    dump = getattr(abc, "_get_dump", None)
    if not isinstance(kind, abc.ABCMeta) or dump is None:
        return ()
    return tuple(sorted(id(found) for each in dump(kind)[0] if (found := each()) is not None))


_MADE_BY_PYTHON = 1 << 9
"""`Py_TPFLAGS_HEAPTYPE`: a class that a class statement has made, and few of those of C."""
