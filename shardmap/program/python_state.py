"""Python state that a backward of the user's reads: numbers, flags and tensors, by their names.

A map reads it when it runs, the loop when the gradient is taken. In between it must not change.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Iterator

import torch


class _Tensor:
    """A tensor that is not held, equal to itself only."""

    def __init__(self, tensor: torch.Tensor):
        self.reference = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tensor) and self.reference() is other.reference() is not None

    def __hash__(self) -> int:
        return hash(id(self))


State = dict[str, object]

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

_functions: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()


def named(function: type) -> str:
    """The name by which `state` finds a Function's class again, the same in each process."""
    name = f"{function.__module__}.{function.__qualname__}"
    _functions[name] = function
    return name


def backward_named(name: str) -> Callable[..., object] | None:
    """The backward of the class that was given this name last, while the class lives."""
    found = _functions.get(name)
    return None if found is None else getattr(found, "backward", None)


def state(function: Callable[..., object]) -> State:
    """List the globals, closure cells and attributes that the code of `function` reads by name."""
    inner = inspect.unwrap(function)
    if not isinstance(inner, types.FunctionType):
        return {}
    names = set(_names(inner.__code__))
    read = {name: inner.__globals__[name] for name in names if name in inner.__globals__}
    cells = zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            read[name] = cell.cell_contents
        except ValueError:  # not bound yet
            continue
    found: State = {}
    for name, value in read.items():
        found.update(_facts(name, value, names, 0))
    return found


def _facts(name: str, value: object, names: set[str], depth: int) -> Iterator[tuple[str, object]]:
    if isinstance(value, _VALUES):
        yield name, (type(value), repr(value))
    elif isinstance(value, torch.Tensor):
        yield name, _Tensor(value)
    elif depth == 3 or isinstance(value, types.ModuleType | types.FunctionType):
        return
    elif isinstance(value, list | tuple):
        yield name, len(value)
        for k, item in enumerate(value[:64]):
            yield from _facts(f"{name}[{k}]", item, names, depth + 1)
    elif isinstance(value, dict):
        yield name, len(value)
        for key in list(value)[:64]:
            yield from _facts(f"{name}[{key!r}]", value[key], names, depth + 1)
    else:
        for own in names:
            item = inspect.getattr_static(value, own, None)
            if isinstance(item, property | types.MemberDescriptorType):
                item = getattr(value, own, None)
            if item is not None:
                yield from _facts(f"{name}.{own}", item, names, depth + 1)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def changed(before: State, now: State) -> str:
    """The first name whose value is another one, with both; empty if there is none."""
    for name in before.keys() | now.keys():
        if before.get(name) != now.get(name):
            values = [_text(s[name]) if name in s else "nothing" for s in (before, now)]
            return f"{name} ({values[0]} then, {values[1]} now)"
    return ""


def _text(fact: object) -> str:
    if isinstance(fact, _Tensor):
        return "a tensor"
    return str(fact[1]) if isinstance(fact, tuple) else f"{fact} items"
