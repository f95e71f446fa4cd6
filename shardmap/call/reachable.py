"""The objects that a function can read by name, listed so that two listings can be compared."""

from __future__ import annotations

import array
import collections
import contextvars
import functools
import os
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy as is_uninitialised

from shardmap._torch import OpOverload, backward_hooks
from shardmap.rules.sparse import memory_of

VALUES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    range,
    slice,
    type(Ellipsis),
)
_LIBRARIES = tuple(
    os.path.join(path, "")
    for path in {
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
    }
    if path
) + (
    os.path.join(os.path.dirname(torch.__file__), ""),
    os.path.join(os.path.dirname(os.path.dirname(__file__)), ""),
)
_COMMON = frozenset((bool, int, float, str, type(None)))
_CONTAINERS = frozenset(
    (
        dict,
        list,
        tuple,
        set,
        frozenset,
        collections.OrderedDict,
        collections.defaultdict,
        collections.deque,
    )
)
"""Container types without attributes."""
_PLAIN = (
    type,
    property,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    OpOverload,
)
"""Types whose attributes need treatment of their own, or never change."""
_LIMIT = 200_000
"""Largest number of listed objects."""


class History:
    """What a map keeps of its calls. It decides nothing, so it is not among what functions read.

    The map's function and options are read all the same: the map closes over them too.
    """

    __slots__ = ()


class Snapshot(tuple[Any, ...]):
    """Facts about an object that can change while it stays the same object."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Unknown:
    """An object that the function can reach and that cannot be compared between calls."""

    what: str


def same(before: list[object], now: list[object]) -> bool:
    """True if two listings hold the same objects and equal numbers."""
    if len(before) != len(now):
        return False
    for a, b in zip(before, now, strict=True):
        if type(a) is weakref.ref:
            if a() is b:
                continue
            return False
        if a is b or (type(a) is Snapshot and type(b) is Snapshot and a == b):
            continue
        if type(a) is not type(b) or not isinstance(a, VALUES):
            return False
        if a != b or repr(a) != repr(b):
            return False
    return True


def held_weakly(found: list[object]) -> list[object]:
    """A listing that keeps only numbers, texts and objects without weak references alive.

    Containers are left out; their contents are listed behind them.
    """

    def weak(value: Any) -> Any:
        if isinstance(value, (*VALUES, Snapshot, Unknown)):
            return value
        try:
            return weakref.ref(value)
        except TypeError:
            return value

    return [weak(value) for value in found]


def reachable(*roots: Any) -> list[object]:
    """Everything that `roots` can read by name, in a fixed order.

    It lists tensors and objects themselves, numbers and strings by value.
    """
    found: list[object] = []
    seen: set[int] = set()
    for root in roots:
        _walk(root, found, seen, frozenset())
    if len(found) > _LIMIT:
        found.append(Unknown(f"more than {_LIMIT:,} objects"))
    return found


def _walk(value: Any, found: list[object], seen: set[int], names: frozenset[str]) -> None:
    if len(found) > _LIMIT:
        return
    found.append(value)
    kind = type(value)
    if kind in _COMMON or kind in VALUES:
        if kind is slice:
            for part in (value.start, value.stop, value.step):
                _walk(part, found, seen, names)
        return
    if isinstance(value, torch.Tensor):  # `.data = ` and `module.to()` change a tensor in place
        if is_uninitialised(value) or value.is_nested:
            return  # one of a lazy module has no shape yet, one of torch.nested has several
        place = value.stride() if value.layout is torch.strided else memory_of(value)
        found.append(Snapshot((value.requires_grad, value.shape, place, value.dtype, value.device)))
        hooks = backward_hooks(value)
        for part in (value.__dict__, hooks and list(hooks.values())):
            if part:
                _walk(part, found, seen, names)
        return
    if id(value) in seen or isinstance(value, History):
        return
    seen.add(id(value))
    if kind is collections.defaultdict:
        _walk(value.default_factory, found, seen, names)
    if kind in _CONTAINERS and not value:
        return
    if isinstance(value, dict | types.MappingProxyType):
        for key, item in value.items():
            if type(key) in _COMMON:
                found.append(key)
            else:
                _walk(key, found, seen, names)
            _walk(item, found, seen, names)
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        found.append(len(value))
        for item in value:
            _walk(item, found, seen, names)
    elif isinstance(value, types.FunctionType):
        _walk_function(value, found, seen)
    elif isinstance(value, types.MethodType):
        _walk(value.__self__, found, seen, names)
        _walk(value.__func__, found, seen, names)
    elif isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
        if not isinstance(value.__self__, types.ModuleType | type):  # `values.__getitem__`
            _walk(value.__self__, found, seen, names)
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            _walk(part, found, seen, names)
    elif isinstance(value, types.ModuleType):
        _walk(kind, found, seen, names)
        library = is_library_module(value)
        for name in sorted(names & vars(value).keys()):
            item = vars(value)[name]
            if not library or isinstance(item, _PLAIN):  # of a library: what may be patched
                _walk(item, found, seen, names)
    elif isinstance(value, type):
        found.append(Snapshot(map(weakref.ref, value.__mro__)))  # its bases may be replaced
        if type(value) is not type:
            _walk(type(value), found, seen, names)
        for each in user_classes(value):
            for name, item in vars(each).items():
                if not name.startswith("__") or isinstance(item, types.FunctionType):
                    _walk(
                        item.__func__ if isinstance(item, classmethod | staticmethod) else item,
                        found,
                        seen,
                        names,
                    )
    elif isinstance(value, property):
        for part in (value.fget, value.fset, value.fdel):
            _walk(part, found, seen, names)
    elif isinstance(value, np.ndarray | np.void):
        form = value.dtype.str if value.dtype.names is None else repr(value.dtype)
        found.append(Snapshot((value.shape, form, value.tobytes())))
        for item in value.reshape(-1).flat if value.dtype.hasobject else ():
            _walk(item, found, seen, names)
    elif isinstance(value, np.dtype):
        found.append(repr(value) if value.names else None)
    elif isinstance(value, bytearray | array.array | memoryview):
        found.append(bytes(value))
    elif isinstance(value, BaseException):
        for part in (value.args, value.__cause__, value.__context__):
            _walk(part, found, seen, names)
    elif isinstance(value, contextvars.ContextVar):
        _walk(value.get(None), found, seen, names)
    elif isinstance(value, Iterator):
        found.append(Unknown(f"an iterator ({type(value).__name__})"))
    if not isinstance(value, _PLAIN) or (isinstance(value, property) and kind is not property):
        _walk_object(value, found, seen, names)


def _walk_function(func: types.FunctionType, found: list[object], seen: set[int]) -> None:
    if is_library(func.__code__.co_filename):
        for cell in func.__closure__ or ():  # a library's decorator around a user's function
            _walk_cell(cell, found, seen, frozenset())
        return
    found.append(func.__code__)
    names = frozenset(_names(func.__code__))
    for cell in func.__closure__ or ():
        _walk_cell(cell, found, seen, names)
    for value in (
        *(func.__defaults__ or ()),
        *(func.__kwdefaults__ or {}).values(),
        *func.__dict__.values(),
    ):
        _walk(value, found, seen, names)
    for name in sorted(names):
        if name in func.__globals__:
            _walk(func.__globals__[name], found, seen, names)
        elif name in sys.modules:  # imported inside the function
            _walk(sys.modules[name], found, seen, names)


def _walk_cell(
    cell: types.CellType, found: list[object], seen: set[int], names: frozenset[str]
) -> None:
    try:
        contents = cell.cell_contents
    except ValueError:  # not assigned yet
        found.append("empty cell")
        return
    _walk(contents, found, seen, names)


def _walk_object(value: Any, found: list[object], seen: set[int], names: frozenset[str]) -> None:
    kind = type(value)
    if kind in _CONTAINERS:
        return
    _walk(kind, found, seen, names)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and attributes:
        caches = caches_of(kind) - names
        for key, item in attributes.items():
            if key in caches:
                continue
            found.append(key)
            if type(item) in _COMMON:
                found.append(item)
            elif type(item) not in _CONTAINERS or item:
                _walk(item, found, seen, names)
    for slot in slots_of(kind):
        try:
            part = slot.__get__(value)
        except AttributeError:  # it is empty
            continue
        _walk(part, found, seen, names)


_CACHES = {torch.nn.RNNBase: frozenset(("_flat_weights", "_flat_weight_refs"))}


@functools.lru_cache(maxsize=4096)
def caches_of(kind: type) -> frozenset[str]:
    """Attributes in which objects of a class of torch keep what they derive from others.

    They are derived anew when they no longer fit, so they decide nothing: a recurrent layer whose
    weights were replaced for a moment (`functional_call`) has other lists of them afterwards.
    """
    return frozenset().union(*[names for base, names in _CACHES.items() if issubclass(kind, base)])


def user_classes(kind: type) -> tuple[type, ...]:
    """The classes that `kind` inherits from, itself included, without those of libraries."""
    return _users_among(kind.__mro__)


def slots_of(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    """The slots of a class and of those that it inherits from, some of which are written in C."""
    return _slots_among(kind.__mro__)


@functools.lru_cache(maxsize=4096)
def _users_among(kinds: tuple[type, ...]) -> tuple[type, ...]:
    return tuple([k for k in kinds if not is_library_module(sys.modules.get(k.__module__))])


@functools.lru_cache(maxsize=4096)
def _slots_among(kinds: tuple[type, ...]) -> tuple[types.MemberDescriptorType, ...]:
    found = [value for kind in kinds for value in vars(kind).values()]
    return tuple([value for value in found if type(value) is types.MemberDescriptorType])


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_names(constant))
    return tuple(sorted(names))


def is_library_module(module: types.ModuleType | None) -> bool:
    """True if a module belongs to a library; one that was made by hand, or typed in, does not."""
    file = None if module is None else vars(module).get("__file__")  # not its `__getattr__`'s
    if file is None and module is not None:
        return vars(module).get("__spec__") is not None
    return is_library(file)


@functools.cache
def is_library(filename: str | None) -> bool:
    """True if a file of code belongs to python, to an installed package or to shardmap."""
    return (
        filename is None
        or filename.startswith("<frozen")
        or os.path.abspath(filename).startswith(_LIBRARIES)
    )
