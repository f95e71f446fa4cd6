"""What returns an object that a backward reads, when it is looked at after the recorded call.

Objects are held weakly where they can be: a recording must keep none of a sample's.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import cast

import torch

from shardmap.program.code_names import names_in
from shardmap.program.object_parts import cells_of
from shardmap.program.settings import VALUES
from shardmap.program.state_facts import Walk, is_library

_DEPTH = 3


def is_value(value: object) -> bool:
    """True for an object that never changes; not for a weak proxy of one, which may be gone."""
    return type(value) not in weakref.ProxyTypes and isinstance(value, VALUES)


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not bound
        return None


def references(function: types.FunctionType) -> dict[str, int]:
    """Number of references to each variable of a function's closure, some of them this one's."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: sys.getrefcount(cell) for name, cell in cells}


def _closed_over(alone: int) -> Callable[[], int]:
    return lambda: alone


_ALONE = references(cast(types.FunctionType, _closed_over(0)))["alone"]
"""References to a variable that only the closure holds."""


def _weakly(
    value: object, is_sample: Callable[[torch.Tensor], bool]
) -> Callable[[], object] | None:
    """A function that returns an object; None if the object belongs to the sample, or is fixed."""
    if type(value) in weakref.ProxyTypes:  # what it refers to may be gone
        return functools.partial(_same, value)
    if isinstance(value, VALUES) or any(map(is_sample, _tensors(value, 0))):
        return None
    try:
        return weakref.ref(value)
    except TypeError:  # a list, a dict or the like
        return functools.partial(_same, value)


def same_root(get: Callable[[], object], later: Callable[[], object]) -> bool:
    """True if two roots are the same variable or object, or if the first one's is gone."""
    if isinstance(get, _Remade | _Bound):
        return get.is_same(later)
    a, b = [g.args[0] if isinstance(g, functools.partial) else g() for g in (get, later)]
    return a is b or a is None


def loosened(get: Callable[[], object]) -> Callable[[], object]:
    """A root that holds no variable of a call that has ended, which nothing can bind anew."""
    if isinstance(get, _Remade):
        get.loosen()
    cell = get.args[0] if isinstance(get, functools.partial) else None
    if type(cell) is not types.CellType or sys.getrefcount(cell) > _HELD_HERE:
        return get
    return _weakly(_contents(cell), lambda _: False) or _nothing


_HELD_HERE = 3
"""References to a variable that only a root holds, as `loosened` sees it."""


def _nothing() -> None:
    return None


def _same(value: object) -> object:
    return value


def _tensors(value: object, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < _DEPTH and isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth + 1)


def roots_of_cells(
    function: types.FunctionType, is_sample: Callable[[torch.Tensor], bool], depth: int
) -> dict[str, Callable[[], object] | None]:
    """For each variable that a function closes over: what returns its value, as for `_weakly`."""
    counts, names = references(function), names_in(function.__code__)
    getters: dict[str, Callable[[], object] | None] = {}
    for name, value in cells_of(function).items():
        walk = Walk(names)
        walk.walk(name, value, name)
        getters[name] = None
        if counts[name] > _ALONE and not any(map(is_sample, walk.tensors)):
            position = function.__code__.co_freevars.index(name)
            getters[name] = functools.partial(_contents, (function.__closure__ or ())[position])
        elif not is_value(value):  # no other function can bind the variable anew
            getters[name] = root_of(value, is_sample, depth)
    return getters


class _Remade:
    """Returns a function that only the recorded call has held, or another one in its place.

    The other one has the same code and reads the same variables, without what is the sample's.
    """

    def __init__(
        self, function: types.FunctionType, is_sample: Callable[[torch.Tensor], bool], depth: int
    ):
        self.function = weakref.ref(function)
        self.code, self.scope = function.__code__, function.__globals__
        self.module = function.__module__
        found = roots_of_cells(function, is_sample, depth + 1)
        self.cells = {name: get for name, get in found.items() if get is not None}

    def __call__(self) -> object:
        """Return it."""
        function = self.function()
        if function is None:
            held = [self.cells.get(name) for name in self.code.co_freevars]
            cells = tuple([types.CellType() if g is None else types.CellType(g()) for g in held])
            function = types.FunctionType(self.code, self.scope, closure=cells)
            function.__module__ = self.module
        return function

    def loosen(self) -> None:
        """Hold no variable of the recorded call."""
        self.cells = {name: loosened(get) for name, get in self.cells.items()}

    def is_same(self, later: object) -> bool:
        """True if another reads the same variables by the same code."""
        return (
            isinstance(later, _Remade)
            and self.code == later.code
            and self.scope is later.scope
            and self.cells.keys() == later.cells.keys()
            and all(same_root(get, later.cells[name]) for name, get in self.cells.items())
        )


class _Bound:
    """Returns a method, or a partial function, that only the recorded call has held."""

    def __init__(self, make: Callable[..., object], parts: list[Callable[[], object] | None]):
        self.make, self.parts = make, parts

    def __call__(self) -> object:
        """Return it; None if the object is no more that it is a method of."""
        found = [None if get is None else get() for get in self.parts]
        needed = found[:1] if self.make is _as_partial else found
        return None if any(part is None for part in needed) else self.make(*found)

    def is_same(self, later: object) -> bool:
        """True if another is made of the same objects."""
        return (
            isinstance(later, _Bound)
            and self.make is later.make
            and len(self.parts) == len(later.parts)
            and all(
                (a is b) if a is None or b is None else same_root(a, b)
                for a, b in zip(self.parts, later.parts, strict=True)
            )
        )


def root_of(
    value: object, is_sample: Callable[[torch.Tensor], bool], depth: int
) -> Callable[[], object] | None:
    """As `_weakly`; also for functions and methods, which die with the recorded call."""
    if depth < _DEPTH:
        if isinstance(value, types.FunctionType) and not is_library(value.__module__):
            return _Remade(value, is_sample, depth)
        if isinstance(value, types.MethodType):
            parts = value.__func__, value.__self__
            return _Bound(types.MethodType, [root_of(p, is_sample, depth + 1) for p in parts])
        if isinstance(value, functools.partial):
            parts = value.func, *value.args, *value.keywords.values()
            return _Bound(_as_partial, [root_of(p, is_sample, depth + 1) for p in parts])
    return _weakly(value, is_sample)


def _as_partial(function: Callable[..., object], *args: object) -> object:
    return functools.partial(function, *args)
