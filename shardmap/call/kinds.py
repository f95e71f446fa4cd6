"""Kinds of objects that a function may read, told apart by their types."""

from __future__ import annotations

import collections
import contextvars
import decimal
import functools
import importlib.machinery
import operator
import sys
import threading
import types
import weakref
from collections.abc import Container
from typing import Any

import numpy as np
import torch

from shardmap._torch import OpOverload
from shardmap.call.reachable import VALUES, History
from shardmap.trace.watch import BUILTINS, is_trusted

MOST = 50_000
"""Largest number of facts that are compared at each call."""
ARRAY_BYTES = 1 << 20
"""Largest array whose contents are compared at each call."""
LIBRARY_ITEMS = 64
"""Largest container among the globals of a library that is compared item by item."""
HEAP = 1 << 9
"""Flag of classes that are written in python (or made while it runs)."""
SIMPLE = frozenset((bool, int, float, complex, str, bytes, type(None), type(NotImplemented)))
CONTAINERS = (
    dict, list, tuple, set, frozenset, collections.deque, types.MappingProxyType,
)  # fmt: skip
EXACT = frozenset(
    (
        *CONTAINERS,
        collections.OrderedDict,
        collections.defaultdict,
        object,
    )
)
KNOWN_BASES = (
    *CONTAINERS, torch.Tensor, int, float, str, bytes, complex,
    types.SimpleNamespace,
)  # fmt: skip
INERT = (
    types.MethodDescriptorType, types.WrapperDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType,
    types.ClassMethodDescriptorType, types.CodeType, np.ufunc, np.dtype, np.generic, OpOverload,
    types.GenericAlias, types.UnionType, contextvars.ContextVar,
    type(threading.Lock()), type(threading.RLock()), torch.layout, torch.memory_format, torch.finfo,
    torch.iinfo, History, type(vars(collections.namedtuple("_", "field"))["field"]),
)  # fmt: skip
"""Types without a state that changes."""
NEVER_WEAK = (
    *VALUES, types.FunctionType, types.ModuleType, type, types.BuiltinFunctionType, OpOverload,
)  # fmt: skip
ASIDE = frozenset(("logging", "threading"))
"""Modules whose objects hold streams and locks, which do not matter."""
OF_CLASSES = frozenset(
    "__dict__ __weakref__ __doc__ __module__ __annotations__ __dataclass_fields__ "
    "__dataclass_params__ __orig_bases__ __parameters__ __abstractmethods__ _abc_impl "
    "__slots__ __firstlineno__ __static_attributes__".split()
)
"""Attributes that a class gets when it is made."""


def is_users(value: Any, kind: type) -> bool:
    """True if an object is neither python's nor torch's: of user's code, or of a user's class."""
    if kind is types.FunctionType:
        return not is_trusted(value.__code__.co_filename)
    if issubclass(kind, types.ModuleType):
        return False
    if issubclass(kind, type):
        kind = value
    home = file_of(kind)
    return kind.__flags__ & HEAP != 0 and not is_trusted(home) and home != ""


def file_of(kind: type) -> str:
    """The file of a class's module, or empty."""
    return vars(sys.modules.get(kind.__module__, types)).get("__file__") or ""


@functools.lru_cache(maxsize=8192)
def is_c(kind: type) -> bool:
    """True if a class is written in C, so that its objects have a state that python cannot list."""
    if kind in EXACT or issubclass(kind, KNOWN_BASES) and not kind.__flags__ & HEAP:
        return False
    if kind in _OPAQUE:
        return True
    module = sys.modules.get(kind.__module__)
    if kind.__module__.startswith("torch._C"):
        return kind.__name__ != "TensorBase"
    if module is None:
        return not kind.__flags__ & HEAP or kind.__name__ == "cython_function_or_method"
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    return loader is importlib.machinery.BuiltinImporter or isinstance(
        loader, importlib.machinery.ExtensionFileLoader
    )


_OPAQUE = (
    type(functools.lru_cache(len)), operator.attrgetter, operator.methodcaller,
    threading.local, torch.jit.ScriptModule,
)  # fmt: skip
"""Classes of python's and torch's modules that are written in C, or stand for what is."""
CONTEXTUAL = (decimal.Decimal, decimal.Context)
"""Classes whose operations follow a context that is nobody's attribute."""


def is_namespace(kind: type) -> bool:
    """True if C makes texts of a class's objects, or compares them, by all their attributes."""
    own = types.SimpleNamespace
    return issubclass(kind, own) and (kind.__repr__ is own.__repr__ or kind.__eq__ is own.__eq__)


def code_of(value: Any) -> list[types.CodeType] | None:
    """The code of a method or descriptor in a class; None for a value."""
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    if isinstance(value, property):
        found = [f.__code__ for f in (value.fget, value.fset) if isinstance(f, types.FunctionType)]
        return found
    return [value.__code__] if isinstance(value, types.FunctionType) else None


def has_run(kind: type, codes: Container[types.CodeType]) -> bool:
    """True if a method of a class is among the code that ran."""
    return any(
        code in codes
        for each in kind.__mro__
        if each.__flags__ & HEAP
        for value in vars(each).values()
        for code in code_of(value) or ()
    )


def made_of(value: object) -> tuple[object, ...]:
    """What a callable other than a function of python calls and hands on.

    A method written in C is bound to an object that it may change (`calls.append`).
    """
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords, vars(value)
    if isinstance(value, property):
        return value.fget, value.fset, value.fdel
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, classmethod | staticmethod):
        return (value.__func__,)
    owner: object = getattr(value, "__self__", None)
    if isinstance(owner, types.ModuleType | type) or type(owner).__name__.startswith(_OF_PYBIND):
        return ()
    return (owner,)


CALLABLES = (
    types.MethodType, functools.partial, classmethod, staticmethod, property,
    types.BuiltinFunctionType, types.MethodWrapperType,
)  # fmt: skip
"""Types whose objects call what they are made of (`made_of`)."""
_LISTED = frozenset((*VALUES, *INERT, *CALLABLES, np.ndarray, weakref.ref, torch.Generator))
_OF_PYBIND = ("PyCapsule", "pybind11_detail_function_record")
"""Beginnings of names of types whose objects stand for a C++ function itself."""


def is_derived(kind: type) -> bool:
    """True if a class is a subclass, made by python, of one whose state is listed in C's way."""
    return bool(kind.__flags__ & HEAP) and kind not in _LISTED and not issubclass(kind, History)


def builtins_of(of: dict[str, Any]) -> object:
    """The namespace of built-in functions that code with these globals uses."""
    found = of.get("__builtins__", BUILTINS)
    return found.__dict__ if isinstance(found, types.ModuleType) else found
