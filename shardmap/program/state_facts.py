"""List what code can read by name: facts about objects, which two listings can compare.

From objects that the code names, the walk goes on to items, to attributes that the code spells out,
and to what the functions among them name themselves.
"""

from __future__ import annotations

import argparse
import array
import builtins
import collections
import contextvars
import ctypes
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import io
import itertools
import operator
import os
import queue
import random
import sys
import threading
import types
import uuid
import weakref
from collections.abc import (
    Collection,
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    Set,
    ValuesView,
)
from typing import cast

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from shardmap._torch import global_hooks, version_of
from shardmap.program.code_names import Names, imported_by, names_in
from shardmap.program.facts import Incomparable, Itself, OfTensor
from shardmap.program.object_parts import (
    behind,
    cells_of,
    defaults_of,
    item_of,
    own_of,
    parts_of,
    registered_with,
    slots_of,
)
from shardmap.program.settings import VALUES, settings_asked

_MOST = 20_000
"""Largest number of facts that are compared."""
_FEW = 64
"""Length of a container from which on plain values are compared as one text."""


@functools.lru_cache(4096)
def is_library(module: object) -> bool:
    """True for a module of torch, of numpy, of python's own library or of shardmap."""
    root = str(module).partition(".")[0]
    return root in ("torch", "numpy", "shardmap") or root in sys.stdlib_module_names


@functools.lru_cache(1024)
def _never_asks_if_it_trains(kind: type) -> bool:
    """True for a module of torch that computes the same in training and in evaluation."""
    code = getattr(getattr(kind, "forward", None), "__code__", None)
    if code is None or not is_library(kind.__module__):
        return False
    return "training" not in names_in(code).attributes


class Walk:
    """A walk from objects to all that code with some names can read of them.

    Args:
        names: The names that the code spells out, with those of functions that it calls.
        ran: Methods that have run though no name leads to them; None for all that there are.
        by_value: True if a write to a tensor is a change.
    """

    def __init__(
        self, names: Names, ran: Set[types.CodeType] | None = frozenset(), by_value: bool = False
    ):
        self.names = names
        self.ran = ran
        self.by_value = by_value
        self.unnamed: set[types.CodeType] = set()
        """Methods of the objects' classes that python may call and that have not run."""
        self.facts: dict[str, object] = {}
        """The facts, by the way to what they are about."""
        self.codes: set[types.CodeType] = set()
        """The code of the user's functions among the objects."""
        self.tensors: list[torch.Tensor] = []
        self._seen: dict[int, tuple[object, str]] = {}
        self._has_modules = False
        self._called: frozenset[str] = frozenset()
        """The names of libraries' functions that go by another name in the code."""

    def scope(self, prefix: str, code: types.CodeType, scope: Mapping[str, object]) -> None:
        """Walk from the globals that a function's code names."""
        names = names_in(code)
        for name in sorted(names.globals & scope.keys()):
            self.walk(f"{prefix}{name}", scope[name], name)
        for name in sorted((names.globals & vars(builtins).keys()) - scope.keys()):
            self._of_library(name, vars(builtins)[name])
        for name in sorted(names.modules):
            for module in imported_by(name, scope):
                self.walk(f"{prefix}{module.__name__}", module)

    def settings(self) -> None:
        """Note what torch answers to the questions for its settings that code may ask."""
        self.facts["torch.get_default_dtype()"] = ("dtype", str(torch.get_default_dtype()))
        names = self.names.attributes | self.names.globals | self._called
        for where, ask in settings_asked(names):
            self.facts[where] = ("setting", str(ask()))
        if self._has_modules:
            hooks = [hook for held in global_hooks if held for hook in held.values()]
            called = [(h, getattr(h, "func", h)) for h in hooks if callable(h)]
            own = [h for h, f in called if not is_library(getattr(f, "__module__", ""))]
            if own:  # those of FlopCounterMode change nothing
                self.walk("hooks of all modules", own)
        if names & _STREAMS and torch.cuda.is_initialized():
            self.facts["the current stream"] = ("setting", str(torch.cuda.current_stream()))

    def walk(self, path: str, value: object, name: str = "") -> None:
        """Walk from one object.

        Args:
            path: The way to it, by which its facts are known.
            value: The object.
            name: The name that code reads it by; empty if it is an item of another object.
        """
        if len(self.facts) > _MOST:
            self.facts["more than can be compared"] = Incomparable(f"over {_MOST:,} values")
            return
        kind = type(value)
        if kind in (dict, list, tuple) and (keys := self.names.keys_of(name)):
            for key in keys:
                self.walk(f"{path}[{key!r}]", item_of(value, key))
        elif kind in weakref.ProxyTypes:
            self.walk(path, behind(value))
        elif isinstance(value, enum.Enum):
            self.facts[path] = (Itself(kind), str(value))
            for name in sorted(self.names.attributes & vars(value).keys() - _OF_MEMBERS):
                self.walk(f"{path}.{name}", vars(value)[name])
            for name in sorted(self.names.attributes & {"value", "_value_"}):
                self.walk(f"{path}.{name}", vars(value).get("_value_"))
        elif isinstance(value, VALUES) and not getattr(value, "__dict__", None):
            self.facts[path] = (kind, repr(value))
        elif id(value) in self._seen:
            self.facts.setdefault(path, ("as", self._seen[id(value)][1]))
        else:
            self._seen[id(value)] = value, path
            self._follow(path, value, kind)

    def _follow(self, path: str, value: object, kind: type) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(path, value)
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif isinstance(value, types.BuiltinFunctionType):
            self.facts[path] = Itself(value)
            self._called |= {value.__name__}
        elif isinstance(value, _CData):
            self._ctypes(path, cast(ctypes.Structure, value), kind)
        elif isinstance(value, types.ModuleType):
            self._module(path, value)
        elif isinstance(value, type):
            self.facts[path] = Itself(value)
            for name in sorted(self.names.attributes & _OF_CLASSES):
                self.walk(f"{path}.{name}", getattr(value, name))
            if registered := registered_with(value):
                others = f"{len(registered)} classes registered"
                self.facts[f"subclasses of {path}"] = (value, others, registered)
            self._class(path, value, True)
        elif isinstance(value, _WRAPPERS):
            for number, part in enumerate(parts_of(value)):
                self.walk(f"{path}{'.func' if not number else f'.part {number}'}", part)
        elif isinstance(value, np.ndarray):
            data = value.tobytes() if not value.dtype.hasobject else repr(value).encode()
            self.facts[path] = ("array", f"{value.dtype}{value.shape}", _digest(data))
        elif isinstance(value, bytearray | memoryview | array.array):
            self.facts[path] = (kind, f"{len(value)} items", _digest(bytes(value)))
        elif isinstance(value, Mapping | collections.UserDict):
            self._mapping(path, value)
        elif isinstance(value, list | tuple | set | frozenset | collections.deque):
            self._items(path, value)
        elif isinstance(value, contextvars.ContextVar):
            self.walk(f"{path}.get()", value.get(None))
        elif isinstance(value, contextvars.Context):
            for var in value:
                self.walk(f"{path}[{var.name}]", value[var])
        elif isinstance(value, torch.Generator):
            self.facts[path] = Itself(value)
            if "initial_seed" in self.names.attributes:
                self.facts[f"{path}.initial_seed()"] = ("seed", value.initial_seed())
            if self.names.attributes & {"get_state", "graphsafe_get_state"}:
                state = value.get_state().numpy().tobytes()
                self.facts[f"{path}.get_state()"] = ("random", "a state", _digest(state))
        elif isinstance(value, queue.Queue | queue.SimpleQueue):
            self._queue(path, value)
        elif isinstance(value, RemovableHandle):
            self.facts[path] = Itself(value)
        elif isinstance(value, random.Random):
            self.facts[path] = ("random", "a state", hash(value.getstate()))
        elif isinstance(value, np.random.Generator | np.random.RandomState):
            own = isinstance(value, np.random.Generator)
            state = value.bit_generator.state if own else value.get_state()
            self.facts[path] = ("random", "a state", _digest(repr(state).encode()))
        elif isinstance(value, KeysView | ValuesView | ItemsView):
            self._items(path, list(value))
        elif isinstance(value, _TEXTUAL):
            self.facts[path] = (kind, repr(value))
        elif isinstance(value, operator.attrgetter):
            self.facts[path] = Incomparable("an attrgetter, whose names are not followed")
        elif isinstance(value, itertools.count | itertools.repeat):
            self.facts[path] = (kind, repr(value))
        elif isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            self.facts[path] = Incomparable("an iterator, whose state cannot be compared")
        else:
            self._object(path, value, kind)

    def _tensor(self, path: str, tensor: torch.Tensor) -> None:
        self.facts[path] = OfTensor(tensor)
        self.tensors.append(tensor)
        named = self.names.attributes
        if (self.by_value or named & _READ_BY) and not tensor.is_inference():
            self.facts[f"values of {path}"] = ("values", f"version {version_of(tensor)}")
        for name in sorted(_OF_TENSORS & named):
            self.facts[f"{path}.{name}"] = (name, str(getattr(tensor, name)))
        if "grad" in named and tensor.is_leaf:
            grad = tensor.grad
            self.facts[f"{path}.grad"] = (None, None) if grad is None else OfTensor(grad)
        for name in sorted(named & vars(tensor).keys()):
            self.walk(f"{path}.{name}", vars(tensor)[name])

    def _function(self, path: str, function: types.FunctionType) -> None:
        code = function.__code__
        if is_library(function.__module__) and is_library(function.__globals__.get("__name__")):
            self.facts[path] = Itself(function)
            self._called |= {function.__name__}
            return
        if is_library(function.__globals__.get("__name__")) and hasattr(function, "dispatch"):
            self.walk(f"{path}.registry", vars(function).get("registry"))  # singledispatch's
        self.codes.add(code)
        self.facts[path] = code
        inside = f"{path}: "
        for name, value in (*defaults_of(function).items(), *cells_of(function).items()):
            self.walk(f"{inside}{name}", value, name)
        for name in sorted(self.names.attributes & vars(function).keys()):
            self.walk(f"{path}.{name}", vars(function)[name])
        for name in sorted(self.names.attributes & _OF_FUNCTIONS):
            self.walk(f"{path}.{name}", getattr(function, name))
        self.scope(inside, code, function.__globals__)

    def _module(self, path: str, module: types.ModuleType) -> None:
        self.facts[path] = Itself(module)
        own = vars(module)
        if module is os and self.names.attributes & {"environ", "getenv"}:
            self.facts["os.environ"] = (
                "environment",
                "its variables",
                hash(tuple(os.environ.items())),
            )
        for name in sorted(self.names.attributes & own.keys()):
            if not is_library(module.__name__):
                self.walk(f"{path}.{name}", own[name])
            else:
                self._of_library(f"{path}.{name}", own[name])

    def _of_library(self, path: str, value: object) -> None:
        """Note what a library's module holds by a name: another function may be put there."""
        if isinstance(value, types.BuiltinFunctionType | type | torch.Tensor):
            self.facts[path] = Itself(value)
        elif isinstance(value, (types.FunctionType, types.ModuleType, *VALUES)):
            self.walk(path, value)

    def _mapping(self, path: str, value: Mapping[object, object]) -> None:
        kind = type(value)
        if not is_library(kind.__module__):
            self._object(path, value, kind)
            if not isinstance(value, dict):
                return
        if isinstance(value, dict) and not isinstance(value, collections.OrderedDict):
            keys = list(dict.keys(value))
        else:  # an ordered one has an order of its own
            keys = list(value)
        texts = [repr(k) if isinstance(k, VALUES) else f"key {n}" for n, k in enumerate(keys)]
        order = [t if isinstance(k, VALUES) else id(k) for k, t in zip(keys, texts, strict=True)]
        self.facts[f"keys of {path}"] = (len(keys), ", ".join(texts), tuple(order))
        for key, text in zip(keys, texts, strict=True):
            held = dict.__getitem__(value, key) if isinstance(value, dict) else value[key]
            self.walk(f"{path}[{text}]", held)

    def _items(self, path: str, value: Collection[object]) -> None:
        kind = type(value)
        if kind.__module__ not in ("builtins", "collections", "torch"):
            self._object(path, value, kind)  # a subclass has attributes, a named tuple methods
        items = list(value)
        self.facts[f"length of {path}"] = (kind, len(items))
        if len(items) > _FEW and all(type(item) in _SIMPLE for item in items):
            self.facts[path] = (kind, "other items", _digest(repr(items).encode()))
            return
        for number, item in enumerate(items):
            self.walk(f"{path}[{number}]", item)

    def _ctypes(self, path: str, value: ctypes.Structure, kind: type) -> None:
        """Note the bytes of an object of C, and walk on to what it points to."""
        if isinstance(value, _POINTER):
            if value and "contents" in self.names.attributes:
                self.walk(f"{path}.contents", operator.attrgetter("contents")(value))
            elif value:
                self.facts[path] = Incomparable("a pointer of ctypes, whose items are not known")
            else:
                self.facts[path] = (kind, "null")
            return
        data = ctypes.string_at(ctypes.addressof(value), ctypes.sizeof(value))
        self.facts[path] = (kind, f"other bytes of {kind.__name__}", _digest(data))
        for name, *_ in getattr(kind, "_fields_", ()):
            if name in self.names.attributes and isinstance(getattr(value, name), _CData):
                self.walk(f"{path}.{name}", getattr(value, name))

    def _queue(self, path: str, value: queue.Queue[object] | queue.SimpleQueue[object]) -> None:
        """Note what a queue holds, if code may ask it."""
        self.facts[path] = Itself(value)
        if not self.names.attributes & _OF_QUEUES:
            return
        if isinstance(value, queue.Queue):
            self.walk(f"{path}.queue", list(value.queue))
        else:
            self.facts[f"{path}.qsize()"] = ("size", value.qsize())

    def _object(self, path: str, value: object, kind: type) -> None:
        self.facts[f"class of {path}"] = Itself(kind)
        self._has_modules |= isinstance(value, torch.nn.Module)
        if str(kind.__module__).partition(".")[0] in _ASIDE:
            self.facts[path] = Itself(value)
            return
        places = list(own_of(value))
        everything = self.names.dynamic or (is_library(kind.__module__) and kind not in _BY_NAME)
        aside = _CACHES if everything else frozenset[str]()
        asked = self.names.dynamic or "training" in self.names.attributes
        if not asked and _never_asks_if_it_trains(kind):
            aside |= {"training"}
        for place in places:
            wanted = place.keys() if everything else self.names.attributes & place.keys()
            for name in sorted(wanted - aside, key=str):
                self.walk(f"{path}.{name}", place[name], "" if everything else name)
        slots = set(slots_of(kind))
        for name in sorted(slots if everything else self.names.attributes & slots):
            if name in self.names.attributes or not is_library(kind.__module__):
                self.walk(f"{path}.{name}", getattr(value, name, None))
        if isinstance(value, BaseException):
            self.walk(f"{path}.args", value.args)
        if not places and not slots:
            self.facts[path] = Itself(value)
        self._class(path, kind, False, {name for place in places for name in place})

    def _class(self, path: str, kind: type, called: bool, hidden: Collection[object] = ()) -> None:
        """Walk from the attributes of a class, and from methods that have run unnamed.

        Args:
            path: The way to the class, or to an object of the class.
            kind: The class.
            called: True if objects of it may be made.
            hidden: Names that the object has attributes of its own by.
        """
        meta = () if type(kind) is type else type(kind).mro(type(kind))
        for base in (*kind.__mro__, *meta):
            if is_library(base.__module__):
                continue
            of = f"{path}." if base is kind else f"{path}.{base.__name__}."  # super() reads those
            for name, value in list(vars(base).items()):
                if isinstance(value, _DESCRIPTORS):
                    continue
                wanted = name in self.names.attributes
                code = getattr(getattr(value, "__func__", value), "__code__", None)
                if code is None:
                    wanted |= self.names.dynamic and not name.startswith("__")
                elif self.ran is None or code in self.ran:
                    wanted = True
                elif not wanted and (called or name not in _MAKING):
                    self.unnamed.add(code)
                if wanted:
                    way = f"{path}.{base.__name__}." if name in hidden else of
                    self.walk(f"{way}{name}", value)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


_ASIDE = frozenset("logging warnings io pathlib re asyncio concurrent multiprocessing".split())
"""Modules whose objects keep caches and streams, which do not matter."""
_OF_MEMBERS = frozenset("_value_ _name_ _sort_order_ __objclass__".split())
"""What every member of an enumeration has."""
_TEXTUAL = (
    fractions.Fraction, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta,
    uuid.UUID,
)  # fmt: skip
"""Classes of python's library whose text says all."""
_BY_NAME = types.SimpleNamespace, argparse.Namespace, threading.local, object
"""Classes of python's library whose objects are read by the user's names alone."""
_SIMPLE: Set[type] = frozenset((bool, int, float, complex, str, bytes, type(None)))
_OF_TENSORS = frozenset("requires_grad is_leaf shape dtype device".split())
"""What code may ask a tensor that it captures, beside its values."""
_OF_FUNCTIONS = frozenset(
    "__name__ __qualname__ __module__ __doc__ __annotations__ __defaults__ __kwdefaults__".split()
)
_OF_CLASSES = frozenset("__name__ __qualname__ __module__ __doc__ __bases__".split())
_OF_QUEUES = frozenset("qsize empty full get get_nowait queue unfinished_tasks".split())
_READ_BY = frozenset(
    "_version numpy __array__ tolist item data_ptr storage untyped_storage asarray array".split()
)
"""Names by which code reads a tensor so that no operator shows it."""
_WRAPPERS = (
    types.MethodType, functools.partial, staticmethod, classmethod, property, weakref.ref,
    functools.cached_property, functools.singledispatchmethod,
)  # fmt: skip
_POINTER = ctypes.POINTER(ctypes.c_int).__mro__[1]
_CData = ctypes.Structure.__mro__[-2]
"""The class of all data of ctypes, which has no public name."""
_STREAMS = frozenset(("current_stream", "_cuda_getCurrentStream"))
_DESCRIPTORS = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.ClassMethodDescriptorType,
)
_MAKING = frozenset("__init__ __new__ __post_init__ __init_subclass__ __class_getitem__".split())
"""Methods that run where objects are made."""
_CACHES = frozenset(("_is_full_backward_hook", "_non_persistent_buffers_set"))
