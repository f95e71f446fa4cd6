"""What C keeps in objects of python's and numpy's types, where a dict of attributes shows nothing.

Such an object may stay the same one while what it holds is changed: an array's items, what a
`functools.partial` calls, the names of a dtype's fields.
"""

from __future__ import annotations

import array
import functools
import gc
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardmap.call.kinds import ARRAY_BYTES, CALLABLES, INERT, MOST, made_of
from shardmap.call.lookups import Getter, bytes_of, is_limited, kept_results, made_part
from shardmap.call.reachable import VALUES

REMADE = (functools.partial, classmethod, staticmethod, property)
"""Callables that can be given something else to call: `__init__` and `__setstate__` do."""


@dataclass(slots=True)
class State:
    """The state of an object of a type written in C."""

    facts: list[tuple[str, Getter]] = field(default_factory=list)
    """What must stay as it is: its name, and its look-up."""
    parts: list[object] = field(default_factory=list)
    """Objects that are read through this one."""
    entries: dict[object, object] = field(default_factory=dict)
    """A dict whose entries must stay as they are; it may get others."""
    unknown: str = ""
    """Description of the object if its state cannot be compared; else empty."""


CACHED = type(functools.lru_cache(len))


def _cache_of(cached: object) -> State | None:
    """What `functools.lru_cache` keeps for a function; None if python does not show it.

    A call that is replayed would find the results that it found when it was recorded. They lie in
    a dict, in entries of a linked list where the number of results is limited; what C refers to is
    both, the function and the results.
    """
    held = gc.get_referents(cached)
    stores = [each for each in held if type(each) is dict and each is not vars(cached)]
    if len(stores) != 1:
        return None
    if len(stores[0]) > MOST:
        return State(unknown="a large cache")
    results = [*held, *stores[0], *stores[0].values()]  # the arguments, too: tensors among them
    parts = [each for each in results if each is not stores[0] and type(each) is not type]
    facts: list[tuple[str, Getter]] = []
    if is_limited(cached):
        kept = kept_results(cached, stores[0])
        if kept is None:
            return None
        facts = [("what functools.lru_cache keeps", kept)]
    return State(facts, parts, entries=stores[0])


def state_of(value: Any, kind: type) -> State | None:
    """The state of an object of a known type written in C, or of a subclass; None for others."""
    if issubclass(kind, CALLABLES):
        parts = made_of(value)
        facts = range(len(parts)) if issubclass(kind, REMADE) else ()
        what = f"what a {kind.__name__} calls"
        return State([(what, made_part(value, number)) for number in facts], [*parts])
    if issubclass(kind, np.ndarray | np.void):
        plain = type(value) is np.ndarray or issubclass(kind, np.void)
        if value.nbytes > ARRAY_BYTES or value.dtype.hasobject or not plain:
            return State(unknown="a large array")
        return State([("a numpy array", bytes_of(value))], [value.dtype])
    if issubclass(kind, bytearray | array.array):
        return State([("an array", lambda _: bytes(value))])
    if kind is CACHED:
        return _cache_of(value)
    if kind is slice:
        return State(parts=[value.start, value.stop, value.step])
    if issubclass(kind, types.GenericAlias | types.UnionType):
        return State(parts=[*value.__args__])
    if issubclass(kind, np.dtype):  # python may replace the names of its fields
        return State([("a dtype", lambda _: repr(value))] if value.names else [])
    return State() if issubclass(kind, (*VALUES, *INERT)) else None
