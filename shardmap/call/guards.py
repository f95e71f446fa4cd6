"""Guards of a recording: what the function read while it was recorded, compared at each call.

A guard is made from the code that ran (`trace.watch`) and from what that code names: globals,
closure cells, defaults, attributes, items of containers. Attributes are compared only if some code
that ran spells out their names; so a counter that nobody reads does not matter. Most of the facts
are entries of dicts, and python numbers the versions of a dict: while the number is the same,
nothing in it is looked at.
"""

from __future__ import annotations

import itertools
import operator
import types
import weakref
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardmap._torch import backward_hooks, dict_version, functorch, missing
from shardmap.call.kinds import HEAP, NEVER_WEAK
from shardmap.call.lookups import ABSENT, Getter
from shardmap.call.reachable import VALUES
from shardmap.trace.recording import wrappers_of

_NUMBERED = "torch._C._dynamo.guards.dict_version" not in missing()
TENSOR = object()
"""Stands for a tensor in a list: tensors are looked up by their places."""


@dataclass(slots=True)
class Entries:
    """The values that a dict must hold at the names that the function reads."""

    of: dict[object, object]
    where: str
    values: dict[object, object] = field(default_factory=dict)
    keys: tuple[object, ...] | None = None
    """All keys in order, if the function may iterate over the dict; else None."""
    absent: frozenset[object] = frozenset()
    """Names that the function reads and that are found elsewhere: among the built-in ones."""
    among: frozenset[str] = frozenset()
    """Names that the function may look for here, of which it has found `present` ones only: others
    are in a class, or nowhere (`getattr(settings, "scale", 1.0)`). One set serves many dicts."""
    present: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that must be as it was, looked up by a function."""

    what: str
    look: Getter
    value: object


class Found:
    """What a function reads, listed by `reads.Walk`, to be made into `Guards`.

    Args:
        gone: Called when an object dies whose attributes are compared.
    """

    def __init__(self, gone: Callable[[object], None]):
        self._gone = gone
        self.entries: dict[int, Entries] = {}
        self.lists: list[tuple[Collection[object], tuple[object, ...], str]] = []
        self.empty: list[object] = []
        self.kinds: list[tuple[Callable[[], object], type]] = []
        self.namespaces: list[tuple[int, dict[str, object]]] = []
        """The dicts of the attributes of objects, since another may be put in the place of one:
        the object's place among `kinds`, and the dict."""
        self.functions: list[types.FunctionType] = []
        self.classes: dict[type, dict[str, object]] = {}
        """The attributes of classes that are read; tensors among them have places."""
        self.generators: list[torch.Generator] = []
        self.facts: list[Fact] = []
        self.places: dict[int, list[Place]] = {}
        """The places at which each tensor was found, by its address."""
        self.tensors: dict[int, torch.Tensor] = {}

    def entries_of(self, of: dict[Any, Any], where: str) -> Entries:
        """The entries of a dict that are read."""
        found = self.entries.get(id(of))
        if found is None:
            found = self.entries[id(of)] = Entries(of, where)
        return found

    def held(self, value: object) -> object:
        """The value, or a weak reference to an object that must not be kept alive."""
        if issubclass(type(value), weakref.ref):
            return Exactly(value)
        if issubclass(type(value), NEVER_WEAK) or type(value).__hash__ is None:
            return value
        try:
            return weakref.ref(value, self._gone)
        except TypeError:
            return value

    def place(self, tensor: torch.Tensor, place: Place) -> None:
        """Note a place at which a tensor was found."""
        self.tensors[id(tensor)] = tensor
        self.places.setdefault(id(tensor), []).append(place)


@dataclass(frozen=True, slots=True)
class Place:
    """A place that holds a tensor: an entry of a dict or list, a cell, or a part of the root."""

    where: str
    look: Getter
    name: object = None
    """The key of the entry, if it is one of a dict."""


@dataclass(frozen=True, slots=True)
class Exactly:
    """Stands for an object that is itself a weak reference."""

    of: object


def unchanged(value: object, now: object) -> bool:
    """True if a value is the same object, or an equal number or text of the same type."""
    if type(value) is Exactly:
        return value.of is now
    if type(value) is weakref.ref:
        value = value()
    if value is now or (value is TENSOR and isinstance(now, torch.Tensor)):
        return True
    if type(value) is not type(now) or not isinstance(value, VALUES):
        return False
    if type(value).__flags__ & HEAP and type(value) not in VALUES:
        return False  # equal numbers of a derived class may have other attributes
    return bool(value == now) and repr(value) == repr(now)


class Guards:
    """The facts under which a recording stands, checked at each call.

    Args:
        found: What the function reads.
        tensors: The tensors that may be replaced by others of the same form, such as weights
            that a step of training has made anew. All other tensors must be the same.
    """

    def __init__(self, found: Found, tensors: Sequence[torch.Tensor]):
        self._entries = list(found.entries.values())
        self._dicts = [e.of for e in self._entries]
        self._versions = self._numbered()
        self._lists = found.lists
        self._empty = found.empty
        self._objects = [o for o, _ in found.kinds]
        self._kinds = [k for _, k in found.kinds]
        self._holders = [number for number, _ in found.namespaces]
        self._namespaces = [of for _, of in found.namespaces]
        self._functions = found.functions
        self._codes = self._code()
        self._classes = [(vars(kind), _items(read)) for kind, read in found.classes.items()]
        self._kinds_read = list(found.classes)
        self._bases = list(map(_MRO, self._kinds_read))
        self._class_values = [list(read.values()) for read in found.classes.values()]
        self._sizes = self._class_sizes()
        self._facts = found.facts
        self._places = [found.places.get(id(t), []) for t in found.tensors.values()]
        self._first = [places[0].look for places in self._places]
        """The look-up of each tensor that the function can reach."""
        self._others = [
            (number, place.look, place.where)
            for number, places in enumerate(self._places)
            for place in places[1:]
        ]
        numbers = {address: number for number, address in enumerate(found.tensors)}
        self.captured = [numbers[id(t)] for t in tensors]
        """For each captured tensor: its number among those that can be reached."""
        self._own = [vars(t) or None for t in found.tensors.values()]
        """For each tensor its attributes, so that it must be the same one; None if it has none.
        There is no weak reference to it, with which `torch.utils.swap_tensors` refuses it."""
        self._form = _forms(list(found.tensors.values()))
        self.broken = ""
        """Description of what has changed, after a check that failed."""

    def __len__(self) -> int:
        return (
            sum(len(e.values) for e in self._entries)
            + len(self._lists) + len(self._empty) + len(self._kinds) + len(self._facts)
            + len(self._first) + len(self._functions) + len(self._classes)
        )  # fmt: skip

    def _code(self) -> list[object]:
        return [x for look in _OF_FUNCTIONS for x in map(look, self._functions)]

    def _class_sizes(self) -> list[int]:
        return [len(of) for of, _ in self._classes]

    def _same_classes(self) -> bool:
        if self._class_sizes() != self._sizes:
            return False
        if not all(map(operator.is_, map(_MRO, self._kinds_read), self._bases)):
            return False
        try:
            now = [look(of) for of, look in self._classes]
        except KeyError:
            return False
        return all(
            all(map(operator.is_, a, b)) for a, b in zip(now, self._class_values, strict=True)
        )

    def _numbered(self) -> list[int] | None:
        return list(map(dict_version, self._dicts)) if _NUMBERED else None

    def check(self, parts: Sequence[object]) -> list[torch.Tensor] | None:
        """The tensors that the function now reads; None if something else has changed.

        Args:
            parts: The parts of the call's function and arguments (`reads.Root`).
        """
        versions = self._numbered() if self._dicts else self._versions
        if versions != self._versions or versions is None:
            before = self._versions
            for number, entries in enumerate(self._entries):
                if before is None or versions is None or before[number] != versions[number]:
                    if not self._same_entries(entries):
                        return None
            self._versions = versions
        if any(self._empty):
            return self._fail("a container that was empty")
        if self._kinds:
            objects = [look() for look in self._objects]
            if list(map(type, objects)) != self._kinds:
                return self._fail("the class of an object")
            holders = [objects[number] for number in self._holders]
            now = map(object.__getattribute__, holders, itertools.repeat("__dict__"))
            if not all(map(operator.is_, now, self._namespaces)):
                return self._fail("the `__dict__` of an object")
        if self._codes and not all(map(operator.is_, self._code(), self._codes)):
            return self._fail("the code or the defaults of a function")
        if self._classes and not self._same_classes():
            return self._fail("the attributes of a class")
        for container, values, where in self._lists:
            if len(container) != len(values) or not all(map(unchanged, values, container)):
                return self._fail(where)
        for fact in self._facts:
            if not unchanged(fact.value, fact.look(parts)):
                return self._fail(fact.what)
        return self._tensors(parts) if self._first else []

    def _tensors(self, parts: Sequence[object]) -> list[torch.Tensor] | None:
        found = [t for t in [look(parts) for look in self._first] if isinstance(t, torch.Tensor)]
        if len(found) != len(self._first):
            return self._fail("what was a tensor")
        for own, now in zip(self._own, map(vars, found), strict=True):
            if now is not own and (own is not None or now):
                return self._fail("a tensor with attributes of its own")
        for number, look, where in self._others:
            if look(parts) is not found[number]:
                return self._fail(where)
        if len(set(map(id, found))) != len(found):
            return self._fail("a tensor, which is another one that it reads now")
        if self._form != _forms(found):
            return self._fail("a tensor's shape, strides, dtype, device or requires_grad")
        return found

    def _same_entries(self, entries: Entries) -> bool:
        now = entries.of
        if entries.keys is not None:
            if len(now) != len(entries.keys) or not all(map(unchanged, entries.keys, now)):
                self._fail(f"the keys of {entries.where}")
                return False
        if entries.absent and not entries.absent.isdisjoint(dict.keys(now)):
            self._fail(f"{min(map(str, entries.absent & dict.keys(now)))!r} in {entries.where}")
            return False
        if entries.among and (new := entries.among.intersection(dict.keys(now)) - entries.present):
            self._fail(f"{min(new)!r} in {entries.where}")
            return False
        for name, value in entries.values.items():
            if not unchanged(value, dict.get(now, name, ABSENT)):
                self._fail(f"{name!r} in {entries.where}")
                return False
        return True

    def _fail(self, what: str) -> None:
        self.broken = what


@dataclass(frozen=True, slots=True)
class Guarded:
    """The guards of a recording that stands on its very tensors too."""

    guards: Guards
    key: Hashable
    """That of the call's function and arguments (`root.Root`)."""
    tensors: list[torch.Tensor | None]
    """The tensors that were found; None for an argument, which may be another one."""
    whole: bool
    """True if they see all that the function reads: nothing else needs to be compared."""

    def hold(self, key: Hashable, parts: Sequence[object]) -> bool:
        """True if all that the function reads is as it was.

        Args:
            key: The key of the call's function and arguments.
            parts: Their parts.
        """
        if key != self.key or (found := self.guards.check(parts)) is None:
            return False
        return all(own is None or own is now for own, now in zip(self.tensors, found, strict=True))


def _forms(tensors: Sequence[torch.Tensor]) -> tuple[Sequence[object], ...]:
    """The properties of tensors that decide a recording."""
    strides = [t.stride() if t.layout is torch.strided else (str(t.layout),) for t in tensors]
    return (
        list(map(torch.Tensor.size, tensors)),
        strides,
        *[list(map(look, tensors)) for look in _LOOKS],
        list(map(wrappers_of, tensors)) if functorch.peek_interpreter_stack() is not None else (),
    )


_MRO = operator.attrgetter("__mro__")
_OF_FUNCTIONS = tuple(
    operator.attrgetter(name) for name in ("__code__", "__defaults__", "__kwdefaults__")
)
_LOOKS = (
    *[
        operator.attrgetter(name)
        for name in ("requires_grad", "dtype", "device", "is_leaf", "__class__")
    ],
    backward_hooks,
)


def _items(read: dict[str, object]) -> Callable[[Mapping[str, object]], Sequence[object]]:
    """The function that takes several values out of a dict at once."""
    if len(read) > 1:
        return operator.itemgetter(*read)
    return lambda of: [of[name] for name in read]
