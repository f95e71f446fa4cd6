"""Keys that tell functions apart by their code."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch

from shardmap._torch import OpOverload


def identity(func: Callable[..., Any]) -> Hashable | None:
    """A key that identifies the code of a function; None if there is none.

    Two closures of one code count as the same function unless they close over different code: what
    else they close over is in their recordings.
    """
    return _identity(func, frozenset())


def _identity(value: Any, seen: frozenset[int]) -> Hashable | None:
    if id(value) in seen:
        return "itself"
    seen = seen | {id(value)}
    if isinstance(value, types.MethodType):
        return "method", _identity(value.__func__, seen), _identity(value.__self__, seen)
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
        return ("partial", *[_part(part, seen) for part in parts])
    if isinstance(value, types.FunctionType):
        parts = [*(value.__defaults__ or ()), *_cells(value)]
        wrapped = getattr(value, "__wrapped__", None)
        return (value.__code__, *[_part(part, seen) for part in parts], _part(wrapped, seen))
    if isinstance(value, types.BuiltinFunctionType | OpOverload | type):
        return value
    try:
        return _Token.of(value)
    except TypeError:  # no weak references: another object at its address would not be noticed
        return None


def _part(value: Any, seen: frozenset[int]) -> Hashable | None:
    """The key of a function's part: that of its code if it is callable, else None."""
    if callable(value) and not isinstance(value, torch.Tensor):
        return _identity(value, seen)
    return None


def _cells(func: types.FunctionType) -> list[Any]:
    found = []
    for cell in func.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            found.append(None)
    return found


class _Token:
    """Token of one object: equal to no other, nor to a later object at its address."""

    _by_id: dict[int, tuple[weakref.ref[Any], _Token]] = {}

    @staticmethod
    def of(value: Any) -> _Token:
        """The token of an object."""
        entry = _Token._by_id.get(id(value))
        if entry is not None and entry[0]() is value:
            return entry[1]
        key, token = id(value), _Token()
        known = _Token._by_id  # when the process ends, this module's names are gone first

        def forget(reference: weakref.ref[Any]) -> None:
            held = known.get(key)
            if held is not None and held[0] is reference:
                known.pop(key, None)

        _Token._by_id[key] = weakref.ref(value, forget), token
        return token
