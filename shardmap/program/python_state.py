"""Python state that a backward of the user's reads: numbers, flags and tensors, by their names.

A map reads it when it runs, the loop when the gradient is taken. In between it must not change.
"""

from __future__ import annotations

import collections
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Mapping, Set

import torch

from shardmap._threads import fork_safe_lock
from shardmap.program.code_names import Names, names_in
from shardmap.program.facts import text_of
from shardmap.program.object_parts import cells_of, defaults_of
from shardmap.program.roots import (
    is_value,
    loosened,
    references,
    root_of,
    roots_of_cells,
    same_root,
)
from shardmap.program.state_facts import Walk, is_library

CONTEXT = "ctx."
"""Begin of the names of objects that a Function's forward has put on its `ctx`."""

NAMES = "\n"
"""Separates the names of readers where there are several."""

REMOVED = "the hook's handle"
"""What has changed if a hook was removed."""

_MOST_READERS = 16
"""Most readers of one name that are compared: those of several maps, or of several layers."""
_MOST_NAMES = 512

_readers: collections.OrderedDict[str, list[Reader]] = collections.OrderedDict()
_removals: collections.Counter[str] = collections.Counter()
_lock = fork_safe_lock()


class Reader:
    """The code of a backward or of a hook, and the objects that it reaches by name.

    The objects are held weakly where they can be: a recording must keep none of a sample's.

    Args:
        function: The function, which is not held.
        roots: For each name, a function that returns the object that it stands for, or None if it
            is there no more.
        fixed: Names of what belongs to the recorded sample.
        owner: The Function whose backward the code is; None for a hook's.
    """

    def __init__(
        self,
        function: types.FunctionType,
        roots: Mapping[str, Callable[[], object]],
        fixed: frozenset[str],
        owner: type | None,
    ):
        self.owner = None if owner is None else weakref.ref(owner)
        self.function = weakref.ref(function)
        self.code = function.__code__
        self.scope = function.__globals__
        self.roots = dict(roots)
        self.fixed = fixed
        self.ran: Set[types.CodeType] | None = frozenset()
        """Methods that have run though no name leads to them; None for all that there are."""
        self.unnamed: set[types.CodeType] = set()
        """Methods that python may call, though no name leads to them."""
        self.kept_as = ""
        """The name by which it is kept, if it is one of several that a hook has."""
        self.by_value = False
        """True if no operator shows which tensors it reads: writes to any of them count."""
        self.names = self.first = self._names()
        self.first_unnamed = self.unnamed

    def follow(self, ran: Set[types.CodeType] | None) -> None:
        """Read what methods read that no name leads to.

        Args:
            ran: The code that ran while the backward was recorded; None if it is not known.
        """
        if self.unnamed:
            self.ran = ran
            self.names = self._names()

    def _names(self) -> Names:
        """The names that the code spells out, and the functions that it calls by them."""
        names, known = names_in(self.code), {self.code}
        while True:
            walk = self._walk(names, self.ran, [])
            new = walk.codes - known
            if not new:
                self.unnamed = walk.unnamed
                return names
            known |= new
            names = functools.reduce(Names.and_of, map(names_in, new), names)

    def _walk(self, names: Names, ran: Set[types.CodeType] | None, held: list[object]) -> Walk:
        found, function = {name: get() for name, get in self.roots.items()}, self.function()
        if function is not None:  # it may have been given other ones
            now = defaults_of(function) | cells_of(function)
            found |= {name: value for name, value in now.items() if name not in self.fixed}
        walk = Walk(names, ran, self.by_value)
        for name, value in found.items():
            own = name.removeprefix(CONTEXT)
            if value is not None and (own == name or names.dynamic or own in names.attributes):
                walk.walk(name, value, own)
        if not is_library(self.scope.get("__name__")):
            walk.scope("", self.code, self.scope)
        if walk.codes or not is_library(self.scope.get("__name__")):
            walk.settings()
        held += [function, *found.values(), *walk.tensors]
        return walk

    def facts(self, held: list[object]) -> dict[str, object]:
        """The name and value of each number, flag and tensor that the code reads.

        Args:
            held: Takes the objects that must live as long as the facts are to be compared.
        """
        return self._walk(self.names, self.ran, held).facts

    def first_facts(self) -> dict[str, object]:
        """Those that were known before any code had run."""
        return self._walk(self.first, frozenset(), []).facts

    def loosen(self) -> None:
        """Hold no variable of the recorded call, once it has ended."""
        for name, get in self.roots.items():
            self.roots[name] = loosened(get)

    def is_gone(self) -> bool:
        """True if its Function's class is no more, so that nothing can change it."""
        return self.owner is not None and self.owner() is None

    def is_current(self) -> bool:
        """True if it is a hook's, or if its Function still has this backward."""
        if self.owner is None:
            return True
        return getattr(unwrapped(self.called()), "__code__", None) is self.code

    def called(self) -> object:
        """What autograd calls now as the backward of its Function; None of a hook."""
        owner = None if self.owner is None else self.owner()
        return None if owner is None else backward_in(owner)

    def same_objects(self, other: Reader) -> bool:
        """True if the other, a later one, reads the same objects by the same names."""
        return (
            self.code == other.code
            and self.owner == other.owner
            and self.scope is other.scope
            and self._same_defaults(other)
            and self.roots.keys() == other.roots.keys()
            and all(same_root(get, other.roots[name]) for name, get in self.roots.items())
        )

    def _same_defaults(self, other: Reader) -> bool:
        """True if no defaults of one function can change that are not the other's."""
        mine, its = self.function(), other.function()
        return not mine or not its or mine is its or not (defaults_of(mine) or defaults_of(its))


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
    inner = unwrapped(function)
    if not isinstance(inner, types.FunctionType):
        return None
    roots |= defaults_of(inner)
    getters = {name: root_of(value, is_sample, 0) for name, value in roots.items()}
    counts = references(inner)
    getters |= roots_of_cells(inner, is_sample, 0)
    kept = {name: get for name, get in getters.items() if get is not None}
    fixed = [name for name, get in getters.items() if get is None and name in roots | counts]
    given_values = {name for name, value in roots.items() if is_value(value)}
    return Reader(inner, kept, frozenset(fixed) - given_values, owner)


def backward_in(owner: type) -> object:
    """What autograd calls as the backward of a Function, which may define `vjp` instead."""
    backward, vjp = getattr(owner, "backward", None), getattr(owner, "vjp", None)
    return backward if vjp is None or vjp is torch.autograd.Function.vjp else vjp


def unwrapped(function: object) -> object:
    """The function behind the decorators of libraries; the user's own decorators read state too."""
    while is_library(getattr(function, "__globals__", {}).get("__name__")):
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    return function


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
        found = _readers.get(name, [])
        for reader in found:
            reader.loosen()
        if len(found) > 1:  # functions that a recording has made are gone now
            later = [found[k + 1 :] for k in range(len(found))]
            found[:] = [
                reader
                for reader, rest in zip(found, later, strict=True)
                if not any(map(reader.same_objects, rest))
            ]
        found = tuple(found)
    return tuple([reader for reader in found if reader.is_current()])


def name_of(function: object) -> str:
    """A name for a Function's class or a hook, the same in each process."""
    inner = getattr(function, "__func__", getattr(function, "func", function))
    code = getattr(inspect.unwrap(inner) if callable(inner) else inner, "__code__", None)
    line = f":{code.co_firstlineno}" if isinstance(code, types.CodeType) else ""
    called = getattr(inner, "__qualname__", type(inner).__qualname__)
    module = getattr(inner, "__module__", type(inner).__module__)  # methods of C have none
    return f"{module}.{called}{line}"


def note_removal(name: str) -> None:
    """Count a hook that has been removed after it was recorded, by the name of its readers."""
    with _lock:
        _removals[name] += 1


class State:
    """What readers read, and a count of hooks that have been removed, at one moment.

    It holds the objects that the readers hold weakly, as autograd's graph holds a hook.

    Args:
        name: The name by which the readers are kept.
    """

    def __init__(self, name: str):
        self.name = name
        self.readers = [r for each in name.split(NAMES) for r in readers_named(each)]
        self.removed = _removals[name]
        self._held: list[object] = []
        self.facts = [reader.facts(self._held) for reader in self.readers]
        self.called = [reader.called() for reader in self.readers]

    def changed(self) -> str:
        """What is another one now: a name with both values, or a hook; empty if nothing is."""
        if _removals[self.name] != self.removed:
            return REMOVED
        for reader, before, called in zip(self.readers, self.facts, self.called, strict=True):
            if reader.is_gone():
                continue
            if reader.called() != called:
                return "what its class defines as backward or vjp (another function now)"
            now = reader.facts([])
            for name in sorted(before.keys() | now.keys()):
                if name not in now or before.get(name) != now[name]:
                    then, new = [
                        text_of(s[name]) if name in s else "nothing" for s in (before, now)
                    ]
                    return f"{name} ({then} then, {new} now)"
        return ""
