"""A function and its arguments taken apart, so that a closure that is made anew is known again."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from shardmap.call.reachable import VALUES


class Root:
    """A function and its arguments, taken apart.

    Args:
        func: The user's function.
        arguments: The call's arguments that all samples share.
    """

    def __init__(self, func: Callable[..., object], arguments: Sequence[object]):
        self._key: list[Hashable] = []
        self.parts: list[object] = []
        """What the function closes over or is bound to, and the arguments: all but code."""
        self.functions: list[types.FunctionType] = []
        self._seen: dict[int, int] = {}
        self._take(func)
        for argument in arguments:
            self._take(argument)

    @property
    def key(self) -> Hashable:
        """What must be equal for another function to be the same one, apart from its parts."""
        return tuple(self._key)

    def is_as(self, other: Root) -> bool:
        """True if another one was taken apart into the very same parts."""
        return self._key == other._key and all(
            a is b or (type(a) is type(b) and isinstance(a, VALUES) and a == b)
            for a, b in zip(self.parts, other.parts, strict=True)
        )

    def _take(self, value: Any) -> None:
        kind, key = type(value), self._key
        if kind is types.FunctionType:
            if id(value) in self._seen:
                key.append(("again", self._seen[id(value)]))
                return
            self._seen[id(value)] = len(self._seen)
            self.functions.append(value)
            key += (value.__code__, id(value.__globals__), value.__name__, value.__qualname__)
            for cell in value.__closure__ or ():
                try:
                    self._take(cell.cell_contents)
                except ValueError:
                    key.append("empty")
            self._take(value.__defaults__)
            self._take(value.__kwdefaults__)
            if value.__dict__:
                self._take(value.__dict__)
        elif kind is types.MethodType:
            key.append("method")
            self._take(value.__func__)
            self._take(value.__self__)
        elif kind is functools.partial:
            key.append("partial")
            for each in (value.func, value.args, value.keywords, vars(value)):
                self._take(each)
        elif kind is dict and len(value) <= _TAKEN and not any(type(k) not in _KEYS for k in value):
            if id(value) in self._seen:
                key.append(("again", self._seen[id(value)]))
                return
            self._seen[id(value)] = len(self._seen)
            key.append(("dict", tuple(value), tuple(map(type, value))))
            for each in value.values():
                self._take(each)
        elif (kind is list or kind is tuple) and len(value) <= _TAKEN:
            if value and id(value) in self._seen:
                key.append(("again", self._seen[id(value)]))
                return
            self._seen[id(value)] = len(self._seen)
            key.append((kind, len(value)))
            for each in value:
                self._take(each)
        elif value is None:
            key.append(None)
        else:
            key.append("part")
            self.parts.append(value)


_KEYS = frozenset((str, int, bool))
_TAKEN = 2_000
"""Largest container that is taken apart at each call."""
