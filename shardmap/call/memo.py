"""`trace="once"`: replay a recording while the values that the function reads stay the same.

A recording holds tensors by identity and numbers by value. It goes stale when the caller rebinds
what the function reads: `W = W - lr * g`, `model.weight = Parameter(...)`, `settings.scale = 2`. So
everything that the function can reach by name (closure cells, globals, attributes, module
parameters, containers) is listed when it is recorded and compared at each call.
"""

from __future__ import annotations

import array
import collections
import contextvars
import dataclasses
import functools
import logging
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from shardmap._torch import OpOverload, forward_level, generator_id, pytree, storage_id
from shardmap.lower.cache import Lowered
from shardmap.rules.sparse import memory_of
from shardmap.trace.batch import Batch
from shardmap.trace.recording import Recording

logger = logging.getLogger("shardmap")

_VALUES = (
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


class Snapshot(tuple[Any, ...]):
    """Facts about an object that can change while it stays the same object."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Unknown:
    """An object that the function can reach and that cannot be compared between calls."""

    what: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recording and its lowerings, found again without comparing programs."""

    recording: Recording
    structure: pytree.TreeSpec
    """Structure of the function's result."""
    lowerings: dict[Any, Lowered] = field(default_factory=dict)
    outputs: dict[Any, Any] = field(default_factory=dict)
    """Descriptions of its outputs, by device, outer autograd and size of the batch."""
    derived: dict[Any, Any] = field(default_factory=dict)
    """Prepared maps that compute something else from the same recording."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """A recording, and the values that must be unchanged for it to be replayed."""

    prepared: Prepared
    reads: list[Any]
    """The objects and values that the function could reach, as listed by `reachable`."""
    arguments: dict[int, int]
    """Captured tensors that are unmapped arguments: position among the captured -> leaf of the
    call."""
    fixed: dict[int, torch.Tensor]
    """Unmapped arguments that the function can reach by name too: leaf of the call -> the tensor
    that it must be."""

    def rebound(self, batch: Batch) -> Prepared:
        """The recording with the unmapped arguments of this call."""
        if not self.arguments:
            return self.prepared
        captured = list(self.prepared.recording.captured)
        for position, leaf in self.arguments.items():
            captured[position] = batch.leaves[leaf]
        recording = dataclasses.replace(self.prepared.recording, captured=tuple(captured))
        return dataclasses.replace(self.prepared, recording=recording)


class Memory:
    """The recordings of one mapped function, by signature."""

    def __init__(self, func: Callable[..., Any], call: str):
        self.func = func
        self.call = call
        self.kept: dict[Any, Remembered] = {}
        self.said = False

    def recall(self, batch: Batch) -> Remembered | None:
        """The recording that serves this call; None if the function reads changed values."""
        key = signature(batch)
        found = self.kept.get(key)
        if found is None:
            return None
        unchanged = all(batch.leaves[leaf] is tensor for leaf, tensor in found.fixed.items())
        if not unchanged or not same(found.reads, self._reads(batch)):
            self.kept.pop(key, None)
            return None
        return found

    def keep(self, batch: Batch, prepared: Prepared) -> None:
        """Keep a recording, unless the function reads something that cannot be compared."""
        reads = self._reads(batch)
        unknown = next((r for r in reads if type(r) is Unknown), None)
        if unknown is not None:
            self._say(f"the function can reach {unknown.what}, which cannot be compared")
            return
        tensors = [r for r in reads if isinstance(r, torch.Tensor)]
        known = {id(t) for t in tensors}
        parts = {address for t in tensors for address in memory_of(t)}
        given = {generator_id(r) for r in reads if isinstance(r, torch.Generator)}
        if any(generator_id(g) not in given for g in prepared.recording.generators):
            self._say("a torch.Generator that the function draws from cannot be found by name")
            return
        mapped = {i for i, _ in batch.mapped}
        leaves = {
            id(t): i
            for i, t in enumerate(batch.leaves)
            if isinstance(t, torch.Tensor) and i not in mapped
        }
        arguments, fixed = {}, {}
        for position, tensor in enumerate(prepared.recording.captured):
            if id(tensor) in known:
                if id(tensor) in leaves:
                    fixed[leaves[id(tensor)]] = tensor
            elif id(tensor) in leaves:
                arguments[position] = leaves[id(tensor)]
            elif storage_id(tensor.untyped_storage()) not in parts:
                self._say(
                    f"a captured tensor of shape {tuple(tensor.shape)} cannot be found by name "
                    "(closure, global, "
                    "attribute, module parameter)"
                )
                return
        if len(self.kept) >= 64:
            oldest = next(iter(list(self.kept)), None)  # the list is made in one step
            self.kept.pop(oldest, None)
        # The function's result is of this call's first sample: a later call's must not be
        # compared with it.
        recording = dataclasses.replace(prepared.recording, sample=())
        self.kept[signature(batch)] = Remembered(
            dataclasses.replace(prepared, recording=recording), reads, arguments, fixed
        )

    def _reads(self, batch: Batch) -> list[Any]:
        """Objects that the function can reach, by name or through arguments that hold others."""
        return reachable(
            self.func,
            *[leaf for leaf in batch.leaves if not isinstance(leaf, (torch.Tensor, *_VALUES))],
        )

    def _say(self, why: str) -> None:
        if not self.said:
            logger.warning("%s: trace='once' records at each call, because %s", self.call, why)
            self.said = True

    def forget(self, batch: Batch) -> None:
        """Drop the recording for this signature because it is stale."""
        self.kept.pop(signature(batch), None)


def signature(batch: Batch) -> Any:
    """Key of the properties of a call that decide its recording.

    They are those of the arguments, without values and number of samples, and torch's modes.
    """
    parts: list[Any] = [batch.structure, batch.mapped, min(batch.size, 1)]
    dims = dict(batch.mapped)
    firsts: dict[int, int] = {}
    for i, leaf in enumerate(batch.leaves):
        if isinstance(leaf, torch.Tensor):
            d = dims.get(i)
            shape = tuple(leaf.shape)
            stride = leaf.stride() if leaf.layout is torch.strided else (str(leaf.layout),)
            if d is not None:
                shape, stride = shape[:d] + shape[d + 1 :], stride[:d] + stride[d + 1 :]
            grad = leaf.requires_grad, leaf.is_leaf
            twin = firsts.setdefault(id(leaf), i)  # one tensor passed twice is recorded as one
            parts.append((shape, stride, leaf.dtype, leaf.device, *grad, leaf.is_inference(), twin))
        elif isinstance(leaf, _VALUES):
            parts.append((type(leaf), repr(leaf)))
    return (*_hashable(parts), modes())


def _hashable(parts: list[Any]) -> tuple[Any, ...]:
    return (repr(parts[0]), *parts[1:])


def modes() -> tuple[Any, ...]:
    """The settings of torch that a recording depends on."""
    cuda = torch.backends.cuda
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        forward_level(forward_ad) >= 0,
        tuple((torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in ("cpu", "cuda")),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
    )


def same(before: list[Any], now: list[Any]) -> bool:
    """True if two listings hold the same objects and equal numbers."""
    if len(before) != len(now):
        return False
    for a, b in zip(before, now, strict=True):
        if a is b or (type(a) is Snapshot and type(b) is Snapshot and a == b):
            continue
        if type(a) is not type(b) or not isinstance(a, _VALUES):
            return False
        if a != b or repr(a) != repr(b):
            return False
    return True


def reachable(*roots: Any) -> list[Any]:
    """Everything that `roots` can read by name, in a fixed order.

    It lists tensors and objects themselves, numbers and strings by value.
    """
    found: list[Any] = []
    seen: set[int] = set()
    for root in roots:
        _walk(root, found, seen, frozenset())
    if len(found) > _LIMIT:
        found.append(Unknown(f"more than {_LIMIT:,} objects"))
    return found


def _walk(value: Any, found: list[Any], seen: set[int], names: frozenset[str]) -> None:
    if len(found) > _LIMIT:
        return
    found.append(value)
    if type(value) in _COMMON or isinstance(value, _VALUES):
        return
    if isinstance(value, torch.Tensor):  # `.data = ` and `module.to()` change a tensor in place
        place = value.stride() if value.layout is torch.strided else memory_of(value)
        found.append(Snapshot((value.requires_grad, value.shape, place, value.dtype, value.device)))
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if type(value) in _CONTAINERS and not value:
        return
    if isinstance(value, dict | types.MappingProxyType):
        for key, item in value.items():
            found.append(key if isinstance(key, _VALUES) else id(key))
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
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            _walk(part, found, seen, names)
    elif isinstance(value, types.ModuleType):
        if not _is_library(getattr(value, "__file__", None)):
            for name in sorted(names & vars(value).keys()):
                _walk(vars(value)[name], found, seen, names)
    elif isinstance(value, type):
        for kind in _user_classes(value):
            for name, item in vars(kind).items():
                if not name.startswith("__") or name in ("__call__", "__init__"):
                    _walk(
                        item.__func__ if isinstance(item, classmethod | staticmethod) else item,
                        found,
                        seen,
                        names,
                    )
    elif isinstance(value, property):
        for part in (value.fget, value.fset):
            _walk(part, found, seen, names)
    elif isinstance(value, np.ndarray):
        found.append(Snapshot((value.shape, value.dtype.str, value.tobytes())))
        for item in value.flat if value.dtype.hasobject else ():
            _walk(item, found, seen, names)
    elif isinstance(value, bytearray | array.array | memoryview):
        found.append(bytes(value))
    elif isinstance(value, contextvars.ContextVar):
        _walk(value.get(None), found, seen, names)
    elif isinstance(value, Iterator):
        found.append(Unknown(f"an iterator ({type(value).__name__})"))
    if not isinstance(value, _PLAIN):
        _walk_object(value, found, seen, names)


def _walk_function(func: types.FunctionType, found: list[Any], seen: set[int]) -> None:
    if _is_library(func.__code__.co_filename):
        for cell in func.__closure__ or ():  # a library's decorator around a user's function
            _walk_cell(cell, found, seen, frozenset())
        return
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
    cell: types.CellType, found: list[Any], seen: set[int], names: frozenset[str]
) -> None:
    try:
        contents = cell.cell_contents
    except ValueError:  # not assigned yet
        found.append("empty cell")
        return
    _walk(contents, found, seen, names)


def _walk_object(value: Any, found: list[Any], seen: set[int], names: frozenset[str]) -> None:
    kind = type(value)
    if kind in _CONTAINERS:
        return
    _walk(kind, found, seen, names)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and attributes:
        for key, item in attributes.items():
            found.append(key)
            if type(item) in _COMMON:
                found.append(item)
            elif type(item) not in _CONTAINERS or item:
                _walk(item, found, seen, names)
    for slot in _slots(kind):
        if hasattr(value, slot):
            _walk(getattr(value, slot), found, seen, names)


@functools.lru_cache(maxsize=4096)
def _user_classes(kind: type) -> tuple[type, ...]:
    """The classes that `kind` inherits from, itself included, without those of libraries."""
    return tuple(
        [
            k
            for k in kind.__mro__
            if not _is_library(getattr(sys.modules.get(k.__module__), "__file__", None))
        ]
    )


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[str, ...]:
    slots: list[str] = []
    for base in kind.__mro__:
        own = base.__dict__.get("__slots__", ())
        slots += [own] if isinstance(own, str) else own
    return tuple(slots)


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_names(constant))
    return tuple(sorted(names))


@functools.cache
def _is_library(filename: str | None) -> bool:
    return (
        filename is None
        or filename.startswith("<frozen")
        or os.path.abspath(filename).startswith(_LIBRARIES)
    )
