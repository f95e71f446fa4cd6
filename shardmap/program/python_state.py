"""Python state that a backward of the user's reads: numbers, flags and tensors, by their names.

A map reads it when it runs, the loop when the gradient is taken. In between it must not change.
"""

from __future__ import annotations

import collections
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch

from shardmap._threads import fork_safe_lock


class _Tensor:
    """A tensor that is not held, equal to itself only."""

    def __init__(self, tensor: torch.Tensor):
        self.reference = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tensor) and self.reference() is other.reference() is not None

    def __hash__(self) -> int:
        return hash(id(self))


State = dict[tuple[int, str], object]
"""For the number of a reader and a name: a fact about what the name stands for."""

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

CONTEXT = "ctx."
"""Begin of the names of objects that a Function's forward has put on its `ctx`."""

_OPAQUE = types.ModuleType, types.MethodType, staticmethod, classmethod
_DEPTH = 3
_MOST_FUNCTIONS = 32
"""Most functions that are followed from one backward."""
_MOST_READERS = 16
"""Most readers of one name that are compared: those of several maps, or of several layers."""
_MOST_NAMES = 512

_readers: collections.OrderedDict[str, list[Reader]] = collections.OrderedDict()
_lock = fork_safe_lock()


class Reader:
    """The code of a backward or of a hook, and the objects that it reaches by name.

    The objects are held weakly where they can be: a recording must keep none of a sample's.

    Args:
        code: The function's code.
        scope: Its globals.
        roots: For each name, a function that returns the object that it stands for, or None if it
            is there no more.
        owner: The Function whose backward the code is; None for a hook's.
    """

    def __init__(
        self,
        code: types.CodeType,
        scope: Mapping[str, object],
        roots: Mapping[str, Callable[[], object]],
        owner: type | None,
    ):
        self.owner = None if owner is None else weakref.ref(owner)
        self.code = code
        self.scope = scope
        self.roots = roots

    def facts(self) -> Iterator[tuple[str, object]]:
        """The name and value of each number, flag and tensor that the code reads."""
        found = {name: get() for name, get in self.roots.items()}
        found = {name: value for name, value in found.items() if value is not None}
        names = set(_names(self.code))
        queue = [(self.code, self.scope)]
        seen = {self.code}
        reached: dict[str, object] = {}
        while queue and len(seen) <= _MOST_FUNCTIONS:
            code, scope = queue.pop()
            own = set(_names(code))
            names |= own
            read = {name: scope[name] for name in own if name in scope}
            for name, value in (*read.items(), *(found.items() if scope is self.scope else ())):
                for function in _functions_of(value, own):
                    if function.__code__ not in seen:
                        seen.add(function.__code__)
                        queue.append((function.__code__, function.__globals__))
                        reached |= _cells(function)
                reached.setdefault(name, value)
        for name, value in (reached | found).items():
            if name.startswith(CONTEXT) and name.removeprefix(CONTEXT) not in names:
                continue
            yield from _facts(name, value, names, 0)

    def is_gone(self) -> bool:
        """True if its Function's class is no more, so that nothing can change it."""
        return self.owner is not None and self.owner() is None

    def is_current(self) -> bool:
        """True if it is a hook's, or if its Function still has this backward."""
        if self.owner is None:
            return True
        function = inspect.unwrap(getattr(self.owner(), "backward", len))
        return getattr(function, "__code__", None) is self.code

    def same_objects(self, other: Reader) -> bool:
        """True if the other reads the same objects by the same names."""
        return (
            self.code == other.code
            and self.owner == other.owner
            and self.scope is other.scope
            and self.roots.keys() == other.roots.keys()
            and all(_held(get) is _held(other.roots[name]) for name, get in self.roots.items())
        )


def reader_of(
    function: object,
    given: Mapping[str, object],
    is_sample: Callable[[torch.Tensor], bool],
    owner: type | None = None,
) -> Reader | None:
    """The reader of a backward or of a hook; None if it is not written in python.

    Args:
        function: What autograd calls: a function, a method, a partial or an object.
        given: Objects that its code reaches by name, beside its globals and its closure.
        is_sample: True for a tensor that belongs to the recorded sample.
        owner: The Function whose backward it is; None for a hook.
    """
    roots: dict[str, object] = dict(given)
    while not isinstance(function, types.FunctionType):
        if isinstance(function, functools.partial):
            roots |= {f"argument {k}": value for k, value in enumerate(function.args)}
            roots |= function.keywords
            function = function.func
        elif isinstance(function, types.MethodType):
            roots["self"] = function.__self__
            function = function.__func__
        else:
            called = inspect.getattr_static(type(function), "__call__", None)
            if not isinstance(called, types.FunctionType):
                return None
            roots["self"] = function
            function = called
    inner = inspect.unwrap(function)
    if not isinstance(inner, types.FunctionType):
        return None
    names = inner.__code__.co_varnames[: inner.__code__.co_argcount]
    defaults = inner.__defaults__ or ()
    roots |= dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    roots |= inner.__kwdefaults__ or {}
    getters = {name: _weakly(value, is_sample) for name, value in roots.items()}
    counts = _references(inner)
    for name, value in _cells(inner).items():
        if not isinstance(value, _VALUES):
            getters[name] = _weakly(value, is_sample)
        elif counts[name] > _ALONE:  # else no other function can bind the variable anew
            position = inner.__code__.co_freevars.index(name)
            getters[name] = functools.partial(_contents, (inner.__closure__ or ())[position])
    kept = {name: get for name, get in getters.items() if get is not None}
    return Reader(inner.__code__, inner.__globals__, kept, owner)


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not bound
        return None


def _references(function: types.FunctionType) -> dict[str, int]:
    """Number of references to each variable of a function's closure, some of them this one's."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: sys.getrefcount(cell) for name, cell in cells}


def _closed_over(alone: int) -> Callable[[], int]:
    return lambda: alone


_ALONE = _references(cast(types.FunctionType, _closed_over(0)))["alone"]
"""References to a variable that only the closure holds."""


def _weakly(
    value: object, is_sample: Callable[[torch.Tensor], bool]
) -> Callable[[], object] | None:
    """A function that returns an object; None if the object belongs to the sample, or is fixed."""
    if isinstance(value, _VALUES) or any(map(is_sample, _tensors(value, 0))):
        return None
    try:
        return weakref.ref(value)
    except TypeError:  # a list, a dict or the like
        return functools.partial(_same, value)


def _held(get: Callable[[], object]) -> object:
    """What a root refers to: the variable, or the object."""
    return get.args[0] if isinstance(get, functools.partial) else get()


def _same(value: object) -> object:
    return value


def _tensors(value: object, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < _DEPTH and isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth + 1)


def keep(name: str, reader: Reader) -> None:
    """Keep a reader by a name that is the same in each recording of the same code."""
    with _lock:
        known = _readers.setdefault(name, [])
        known[:] = [other for other in known if not other.same_objects(reader)][1 - _MOST_READERS :]
        known.append(reader)
        _readers.move_to_end(name)
        while len(_readers) > _MOST_NAMES:
            _readers.popitem(last=False)


def readers_named(name: str) -> tuple[Reader, ...]:
    """The readers that were kept by a name, without those of backwards that were replaced."""
    with _lock:
        found = tuple(_readers.get(name, ()))
    return tuple([reader for reader in found if reader.is_current()])


def name_of(function: object) -> str:
    """A name for a Function's class or a hook, the same in each process."""
    inner = getattr(function, "__func__", getattr(function, "func", function))
    code = getattr(inspect.unwrap(inner) if callable(inner) else inner, "__code__", None)
    line = f":{code.co_firstlineno}" if isinstance(code, types.CodeType) else ""
    called = getattr(inner, "__qualname__", type(inner).__qualname__)
    module = getattr(inner, "__module__", type(inner).__module__)  # methods of C have none
    return f"{module}.{called}{line}"


def state(readers: Iterable[Reader]) -> State:
    """List the globals, closure cells and attributes that readers read by name."""
    return {(k, name): fact for k, reader in enumerate(readers) for name, fact in reader.facts()}


def _functions_of(value: object, names: set[str]) -> Iterator[types.FunctionType]:
    """The functions of the user's that code with these names calls by an object."""
    if isinstance(value, types.FunctionType):
        found = [inspect.unwrap(value)]
    elif isinstance(value, _VALUES) or isinstance(value, types.ModuleType | torch.Tensor):
        return
    else:
        owner = value if isinstance(value, type) else type(value)
        wanted = names & {name for base in owner.__mro__[:-1] for name in vars(base)}
        found = [inspect.getattr_static(owner, name) for name in (*wanted, "__call__")
                 if hasattr(owner, name)]  # fmt: skip
        found = [f.fget if isinstance(f, property) else getattr(f, "__func__", f) for f in found]
    for function in found:
        if isinstance(function, types.FunctionType) and not _is_library(function.__module__):
            yield function


def _is_library(module: str) -> bool:
    root = module.partition(".")[0]
    return root in ("torch", "numpy") or root in sys.stdlib_module_names


def _cells(function: types.FunctionType) -> dict[str, object]:
    found = {}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        value = _contents(cell)
        if value is not None:
            found[name] = value
    return found


def _facts(name: str, value: object, names: set[str], depth: int) -> Iterator[tuple[str, object]]:
    if isinstance(value, _VALUES):
        yield name, (type(value), repr(value))
    elif isinstance(value, torch.Tensor):
        yield name, _Tensor(value)
    elif isinstance(value, types.FunctionType):
        yield name, value.__code__
    elif depth == _DEPTH or isinstance(value, _OPAQUE):
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
            item = _member(value, own)
            if isinstance(item, property | types.MemberDescriptorType):
                item = getattr(value, own, None)
            if item is not None:
                yield from _facts(f"{name}.{own}", item, names, depth + 1)


def _member(value: object, name: str) -> object:
    """The attribute of this name as it is stored; None if there is none."""
    for place in _own(value):
        if name in place:
            return place[name]
    for base in type(value).__mro__[:-1]:
        if name in vars(base):
            return vars(base)[name]
    return None


def _own(value: object) -> Iterator[Mapping[str, object]]:
    """The dictionaries of an object's own attributes; for a class, those of its bases as well."""
    for owner in value.__mro__[:-1] if isinstance(value, type) else (value,):
        own = getattr(owner, "__dict__", None)
        if isinstance(own, Mapping):
            yield own
            if isinstance(owner, torch.nn.Module):
                for kind in ("_parameters", "_buffers", "_modules"):
                    yield own[kind]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def changed(before: State, readers: Sequence[Reader]) -> str:
    """The first name whose value is another one now, with both; empty if there is none."""
    gone = {number for number, reader in enumerate(readers) if reader.is_gone()}
    before = {key: fact for key, fact in before.items() if key[0] not in gone}
    now = {key: fact for key, fact in state(readers).items() if key[0] not in gone}
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            values = [_text(s[key]) if key in s else "nothing" for s in (before, now)]
            return f"{key[1]} ({values[0]} then, {values[1]} now)"
    return ""


def _text(fact: object) -> str:
    if isinstance(fact, _Tensor):
        return "a tensor"
    if isinstance(fact, types.CodeType):
        return f"the function {fact.co_name}"
    return str(fact[1]) if isinstance(fact, tuple) else f"{fact} items"
