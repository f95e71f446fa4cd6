"""Digests of functions by what they can do: the code that they can reach, and the values it reads.

A store of a function whose samples take several paths is known by such a digest: which of its paths
have been recorded differs from call to call, and so would a digest of recordings.
"""

from __future__ import annotations

import array
import collections
import contextvars
import copyreg
import dataclasses
import dis
import functools
import hashlib
import pickle
import random
import sys
import types
from collections.abc import Callable, Sequence

import numpy as np
import torch

from shardmap._torch import OpOverload
from shardmap.call.kinds import HEAP
from shardmap.call.lookups import ABSENT, member
from shardmap.call.memo import Prepared
from shardmap.call.reachable import (
    VALUES,
    History,
    is_library,
    is_library_module,
    slots_of,
    user_classes,
)
from shardmap.call.shapes import ShapesOfCall
from shardmap.trace.recording import Recording, element

_HISTORY = (
    History,
    ShapesOfCall,
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    random.Random,
)
"""Types of what changes from call to call: recordings, and the states of random generators, whose
draws are known by the seeds of the call."""
_CONTAINERS = (
    dict, types.MappingProxyType, list, tuple, set, frozenset, collections.deque, np.ndarray,
    functools.partial, property, classmethod, staticmethod, types.MethodType,
)  # fmt: skip
_LOGS = (list, set, collections.deque)
_ADDING = ("append", "appendleft", "extend", "add", "update")
"""Methods of these that read nothing: what is only ever added to does not decide what is done."""
_OF_CLASSES = frozenset(
    "__module__ __dict__ __weakref__ __doc__ __qualname__ __annotations__ __annotate__ "
    "__annotate_func__ __annotations_cache__ __firstlineno__ __static_attributes__ "
    "__abstractmethods__ _abc_impl __parameters__ __orig_bases__ __slots__ __match_args__ "
    "__dataclass_fields__ __dataclass_params__".split()
)
"""Attributes of classes that do not change what their objects do."""


def known_by_code(recording: Recording, func: Callable[..., object]) -> Recording:
    """A recording that a store knows by the function's code, not by what was recorded."""
    return dataclasses.replace(recording, function=fingerprint(func))


def prepared_by_code(prepared: Prepared, func: Callable[..., object]) -> Prepared:
    """The same of what is kept of a call."""
    return dataclasses.replace(prepared, recording=known_by_code(prepared.recording, func))


def fingerprint(func: Callable[..., object]) -> str:
    """Digest of the code that a function can reach and of the values that it can read by name.

    It is the same in every process, and does not depend on what has been called before.
    """
    walk = _Walk()
    walk.add(func, frozenset())
    return walk.digest.hexdigest()


class _Walk:
    """A walk through all that a function can reach, which adds it to a digest."""

    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=16)
        self.places: dict[int, int] = {}
        """Positions of the objects that were met, by their addresses."""
        self.held: list[object] = []
        """The objects that were met, so that no other one takes an address."""

    def text(self, *parts: object) -> None:
        """Add texts and numbers."""
        self.digest.update(repr(parts).encode())

    def add(self, value: object, names: frozenset[str]) -> None:
        """Add a value and all that it reaches; of modules only what these names read."""
        kind = type(value)
        if isinstance(value, VALUES):
            return self.text(kind.__qualname__, value)
        if kind is not tuple and kind is not frozenset:  # equal constants may be one, or several
            if id(value) in self.places:
                return self.text("met", self.places[id(value)])
            self.places[id(value)] = len(self.places)
            self.held.append(value)
        self.text(kind.__module__, kind.__qualname__)
        if isinstance(value, _HISTORY):
            return None
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, type):
            return self._class(value, names)
        if isinstance(value, types.ModuleType):
            return self._module(value, names)
        if isinstance(value, types.BuiltinFunctionType | OpOverload):
            return self.text(str(getattr(value, "__qualname__", value)))
        self._parts(value, names)
        return None

    def _parts(self, value: object, names: frozenset[str]) -> None:
        """Add the parts of containers, methods and other objects."""
        if isinstance(value, types.MethodType):
            self._each((value.__self__, value.__func__), names)
        elif isinstance(value, functools.partial):
            self._each((value.func, value.args, value.keywords), names)
        elif isinstance(value, property):
            self._each((value.fget, value.fset), names)
        elif isinstance(value, classmethod | staticmethod):
            self.add(value.__func__, names)
        elif isinstance(value, contextvars.ContextVar):
            self.add(value.get(None), names)
        elif isinstance(value, np.ndarray):
            self.text(value.shape, value.dtype.str)
            if value.dtype.hasobject:
                self._each(tuple(value.flat), names)
            else:
                self.digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, bytearray | array.array | memoryview):
            self.digest.update(bytes(value))
        elif isinstance(value, np.generic):
            self.text(value.dtype.str, value.item())
        else:
            if isinstance(value, dict | types.MappingProxyType):
                self._each([part for pair in value.items() for part in pair], names)
            elif isinstance(value, list | tuple | collections.deque):
                self._each(list(value), names)
            elif isinstance(value, set | frozenset):
                self.text(sorted([_apart(part, names) for part in value]))
            self._object(value, names)

    def _each(self, values: Sequence[object], names: frozenset[str]) -> None:
        self.text(len(values))
        for value in values:
            self.add(value, names)

    def _object(self, value: object, names: frozenset[str]) -> None:
        """Add an object's class and attributes."""
        compiled = vars(value).get("_modules", {}) if hasattr(value, "__dict__") else {}
        if "_orig_mod" in compiled:  # torch.compile around a module keeps what it has compiled
            return self.add(compiled["_orig_mod"], names)
        self.add(type(value), names)
        for name, item in getattr(value, "__dict__", {}).items():
            self.text(name)
            if "_hooks" in name and isinstance(item, dict):  # by numbers that count all hooks
                self._each(list(item.values()), names)
            else:
                self.add(item, names)
        slots = [s for s in slots_of(type(value)) if s.__objclass__.__flags__ & HEAP]
        for slot in slots:
            if (found := member(lambda: value, slot)(())) is not ABSENT:
                self.add(found, names)
        if not slots and not hasattr(value, "__dict__") and not isinstance(value, _CONTAINERS):
            self._opaque(value, names)
        return None

    def _opaque(self, value: object, names: frozenset[str]) -> None:
        """Add what pickle would write of an object of a type that is written in C."""
        kind = type(value)
        try:
            reduce = copyreg.dispatch_table.get(kind)
            parts = value.__reduce_ex__(2) if reduce is None else reduce(value)
        except (TypeError, pickle.PickleError):  # locks, files: there is nothing to read
            return
        self._each(parts if isinstance(parts, tuple) else (parts,), names)

    def _tensor(self, value: torch.Tensor) -> None:
        plain = element(value).detach()
        self.text(tuple(plain.shape), str(plain.dtype), str(plain.layout))
        if plain.is_meta:
            return
        if plain.layout is torch.sparse_coo:
            own = plain.coalesce()
            parts = [own.indices(), own.values()]
        elif plain.layout in (torch.sparse_csr, torch.sparse_bsr):
            parts = [plain.crow_indices(), plain.col_indices(), plain.values()]
        elif plain.layout in (torch.sparse_csc, torch.sparse_bsc):
            parts = [plain.ccol_indices(), plain.row_indices(), plain.values()]
        elif plain.is_quantized:
            parts = [plain.dequantize()]
        elif plain.is_nested:
            parts = list(plain.unbind())
        else:
            parts = [plain]
        for part in parts:
            dense = part.cpu().resolve_conj().resolve_neg().contiguous()
            self.digest.update(dense.flatten().view(torch.uint8).numpy().data)

    def _function(self, func: types.FunctionType) -> None:
        original = getattr(func, "_torchdynamo_orig_callable", None)
        if original is not None:  # torch.compile around a function keeps what it has compiled
            return self.add(original, frozenset())
        library = is_library(func.__code__.co_filename)
        self.text(library, func.__module__ if library else "", func.__qualname__ if library else "")
        names = frozenset() if library else _attributes(func.__code__)
        if not library:
            self._code(func.__code__)
        logs = frozenset() if library else _logs(func.__code__)
        for name, cell in zip(func.__code__.co_freevars, func.__closure__ or (), strict=True):
            try:
                contents = cell.cell_contents
            except ValueError:  # not assigned yet
                self.text("empty cell")
                continue
            if name not in logs or type(contents) not in _LOGS:
                self.add(contents, names)
        if library:
            return self.add(func.__dict__.get("__wrapped__"), names)
        self._each(func.__defaults__ or (), names)
        self.add(func.__kwdefaults__, names)
        self.add(func.__dict__, names)
        for name in _globals(func.__code__):
            self.text(name)
            if name in func.__globals__:
                value = func.__globals__[name]
                if name not in logs or type(value) not in _LOGS:
                    self.add(value, names)
            elif name in sys.modules:  # imported inside the function
                self.add(sys.modules[name], names)
        return None

    def _code(self, code: types.CodeType) -> None:
        """Add what code does, without where it stands."""
        self.digest.update(code.co_code)
        self.text(code.co_names, len(code.co_consts), code.co_flags, code.co_argcount)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self._constant(constant)

    def _constant(self, constant: object) -> None:
        """Add a constant by its value: equal ones of two functions may be one object, or not."""
        if isinstance(constant, tuple):
            self.text(len(constant))
            for part in constant:
                self._constant(part)
        elif isinstance(constant, frozenset):
            self.text(sorted(map(repr, constant)))
        else:
            self.text(constant)

    def _class(self, kind: type, names: frozenset[str]) -> None:
        self.text(kind.__module__, kind.__qualname__)
        for own in user_classes(kind):
            for name, item in vars(own).items():
                if name not in _OF_CLASSES:
                    self.text(name)
                    self.add(item, names)

    def _module(self, module: types.ModuleType, names: frozenset[str]) -> None:
        self.text(module.__name__)
        if not is_library_module(module):
            for name in sorted(names & vars(module).keys()):
                self.text(name)
                self.add(vars(module)[name], names)


def _apart(value: object, names: frozenset[str]) -> str:
    """Digest of a set's part, which stands in no order."""
    walk = _Walk()
    walk.add(value, names)
    return walk.digest.hexdigest()


@functools.cache
def _globals(code: types.CodeType) -> tuple[str, ...]:
    """The names that code reads from its module, and those of modules that it imports."""
    found = {
        str(i.argval)
        for i in dis.get_instructions(code)
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(_globals(constant))
    return tuple(sorted(found))


@functools.cache
def _attributes(code: types.CodeType) -> frozenset[str]:
    """All names of code, those of attributes included."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _attributes(constant)
    return frozenset(found)


@functools.cache
def _logs(code: types.CodeType) -> frozenset[str]:
    """The names whose values code only adds to: `calls.append(1)`."""
    added, read = _added_and_read(code)
    return added - read


def _added_and_read(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names that code adds to, and those that it does anything else with."""
    added, read = set(), set()
    steps = list(dis.get_instructions(code))
    for step, after in zip(steps, steps[1:], strict=False):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            adds = after.opname in ("LOAD_METHOD", "LOAD_ATTR") and after.argval in _ADDING
            (added if adds else read).add(str(step.argval))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_added, inner_read = _added_and_read(constant)
            added |= inner_added
            read |= inner_read
    return frozenset(added), frozenset(read)
