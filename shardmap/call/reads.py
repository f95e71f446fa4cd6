"""List what a function reads: the objects and values that the code which ran can name.

From the parts of the function and its arguments (`Root`), and from the globals of the code that
ran, `Walk` follows attributes, items and cells to everything that this code can read.
"""

from __future__ import annotations

import collections
import gc
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shardmap.call.c_state import CACHED, state_of
from shardmap.call.guards import TENSOR, Fact
from shardmap.call.kinds import (
    ASIDE,
    CONTAINERS,
    CONTEXTUAL,
    EXACT,
    HEAP,
    LIBRARY_ITEMS,
    MOST,
    OF_CLASSES,
    SIMPLE,
    builtins_of,
    code_of,
    file_of,
    has_run,
    is_c,
    is_derived,
    is_namespace,
    is_users,
)
from shardmap.call.lookups import (
    answer_of,
    attributes_of,
    contents,
    item,
    module_named,
    of_class,
    of_thread,
    part,
    referent,
    variable,
    weakly,
)
from shardmap.call.noted import Notes
from shardmap.call.reachable import caches_of, slots_of
from shardmap.call.root import Root
from shardmap.trace.names import lost_code, named_in
from shardmap.trace.watch import BUILTINS, PythonWatch, is_own, is_trusted


def _is_of_a_library(item: tuple[types.CodeType, object]) -> bool:
    return is_trusted(item[0].co_filename)


class Walk(Notes):
    """The walk over everything that the code which ran can read; `found` is its result.

    Args:
        watch: The code that ran, and its calls into C.
        root: The function and its arguments.
        gone: Called when an object dies whose attributes are compared.
    """

    def __init__(self, watch: PythonWatch, root: Root, gone: Callable[[object], None]):
        super().__init__(watch, gone)
        self._codes = watch.codes
        self._bound: set[types.CodeType] = set()
        for func in root.functions:
            self._bound.add(func.__code__)
            self._seen[id(func)] = func
        for number, value in enumerate(root.parts):
            self._read(value, "what the function closes over", part(number))
        self._class(torch.Tensor)  # its methods are called without being named by its class
        if "_version" in self._of_modules:
            self._accuse("it reads the version of a tensor")
        self._globals(watch.codes)
        apart, functions = watch.apart, self.found.functions
        while found := {
            f.__code__: f.__globals__ for f in (*root.functions, *functions) if f.__code__ in apart
        }:
            self._globals(found)
            apart = apart - found.keys()
        self._settings(watch)
        if len(self._seen) > MOST:
            self._accuse(f"it can read more than {MOST:,} objects")
        lost = lost_code(watch.codes, self._bound, apart)
        if lost:  # what it closes over is unknown
            self._accuse(f"it calls {lost}, which cannot be found by name")

    def _globals(self, codes: dict[types.CodeType, dict[str, object]]) -> None:
        # What a library reads is followed less far, and nothing is followed twice.
        for code, of in sorted(codes.items(), key=_is_of_a_library):
            self._trusted = is_trusted(code.co_filename)
            names = named_in(code)
            if builtins_of(of) is not BUILTINS:
                self._accuse("it has built-in functions of its own")
            where = f"the globals of {code.co_filename}"
            for name in names.globals:
                if name in of:
                    self._hold(of, name, where)
                    continue
                self.found.entries_of(of, where).absent |= {name}
                if name in BUILTINS:
                    self._hold(BUILTINS, name, "python's built-in names")
                else:
                    self.found.entries_of(BUILTINS, "python's built-in names").absent |= {name}
            for name in names.modules:
                if name in sys.modules:
                    module = sys.modules[name]
                    self.found.facts.append(Fact(f"the module {name}", module_named(name), module))
                    self._walk(module)
            for chain in names.chains:
                self._chain(of, chain)
            self._trusted = False

    def _chain(self, of: dict[str, object], chain: tuple[str, ...]) -> None:
        """Follow attributes of modules that code spells out in one go."""
        value: Any = of.get(chain[0], sys.modules.get(chain[0]))
        for name in chain[1:]:
            if not issubclass(type(value), types.ModuleType) or name not in vars(value):
                return
            self._hold(vars(value), name, f"the module {value.__name__}")
            value = vars(value)[name]
        if value is sys.modules and not self._trusted:
            self._accuse("it reads sys.modules")

    def _settings(self, watch: PythonWatch) -> None:
        for called, value in watch.states.items():
            self.found.facts.append(Fact(f"{called.__name__}()", answer_of(called), value))
        for read in watch.variables.values():
            value = (look := variable(read))(())
            self.found.facts.append(Fact(f"the context variable {read.name}", look, value))
            self._walk(value)

    def _walk(self, value: object) -> None:
        if type(value) in weakref.ProxyTypes:
            self._unknown(value, "a weak proxy")
            return
        if isinstance(value, torch.Tensor):  # a key, or an item of a set: it must stay the same
            if not self._trusted:
                self._tensor(value, "a tensor that is a key", lambda _: value)
            return
        kind = type(value)
        if kind in SIMPLE or id(value) in self._seen or len(self._seen) > MOST:
            return
        trusted = self._trusted
        if trusted and not is_users(value, kind):
            followed = kind is types.FunctionType or issubclass(kind, CONTAINERS)
            if not followed and not has_run(kind, self._codes):
                return
        else:
            self._trusted = False
        self._seen[id(value)] = value
        self._follow(value, kind)
        self._trusted = trusted

    def _follow(self, value: Any, kind: type) -> None:
        if kind is types.FunctionType:
            self._function(value)
        elif issubclass(kind, types.ModuleType):
            self._module(value)
        elif issubclass(kind, type):
            self._class(value)
        elif issubclass(kind, CONTAINERS):
            self._container(value)
        elif self._follow_c(value, kind):
            if is_derived(kind):
                self._attributes(value)
        elif issubclass(kind, Iterator):
            self._unknown(value, "an iterator")
        else:
            self._object(value)

    def _follow_c(self, value: object, kind: type) -> bool:
        """Follow what C keeps in an object of a known type; False for another type."""
        if isinstance(value, weakref.ref) and issubclass(kind, weakref.ref):
            self._read(value(), "a weak reference", referent(value))
        elif isinstance(value, torch.Generator):
            self.found.generators.append(value)
        elif isinstance(value, threading.local):
            own = of_thread(value)
            self.found.facts.append(Fact("the thread", own, own(())))
            self._walk(own(()))
            self._walk(kind)
        elif (state := state_of(value, kind)) is not None:
            if state.unknown:
                self._unknown(value, state.unknown)
            if kind is CACHED and "cache_info" in self._names:
                self._unknown(value, "how often a cache was hit")
            compared = kind is not CACHED or not self._trusted
            if state.entries and compared:
                entries = self.found.entries_of(state.entries, "what functools.lru_cache keeps")
                entries.values |= {k: self.found.held(v) for k, v in state.entries.items()}
            for what, look in state.facts if compared else ():
                self.found.facts.append(Fact(what, look, self.found.held(look(()))))
            for each in state.parts:
                self._walk(each)
        else:
            return False
        return True

    def _function(self, func: types.FunctionType) -> None:
        """Follow a function that ran: its cells and defaults. Of others identity is enough."""
        file = func.__code__.co_filename
        if not (self._trusted and is_trusted(file)):
            self._named(func, func.__name__)
            self._namespace(func.__dict__, f"the attributes of {func.__name__}", self._names)
        if func.__code__ not in self._codes and not is_own(file):
            if "__code__" in self._names:
                self.found.functions.append(func)
            return
        self._trusted = is_trusted(file)
        self._bound.add(func.__code__)
        self.found.functions.append(func)
        for name, cell in zip(func.__code__.co_freevars, func.__closure__ or (), strict=True):
            look = contents(cell)
            self._read(look(()), f"{name!r}, which {func.__name__} closes over", look)
        for number, value in enumerate(func.__defaults__ or ()):
            self._item(func.__defaults__, number, value, f"the defaults of {func.__name__}")
        if func.__kwdefaults__:
            self._walk(func.__kwdefaults__)
        self._trusted = False

    def _module(self, module: types.ModuleType) -> None:
        names = vars(module)
        file = names.get("__file__") or ""
        if self._trusted:
            return
        where = f"the module {names.get('__name__')}"
        self.found.kinds.append((weakly(module), type(module)))
        if type(module) is not types.ModuleType:
            self._walk(type(module))
        entries = self.found.entries_of(names, where)
        entries.among = self._of_module
        entries.present = entries.among & names.keys()
        read = set(entries.present)
        if self._dynamic and not is_trusted(file):
            entries.keys = tuple(names)
            read |= {name for name in names if not name.startswith("__")}
        library = not file or is_trusted(file)
        if module is sys and "modules" in read:
            self._accuse("it reads sys.modules")
        for name in read:
            value = names[name]
            if isinstance(value, type) and issubclass(value, CONTEXTUAL):
                self._class(value)
            self._trusted = library and not issubclass(type(value), types.ModuleType)
            self._hold(names, name, where)
        self._trusted = False

    def _class(self, kind: type) -> None:
        if kind in CONTEXTUAL:
            self._unknown(kind, "a class whose results follow a context")
        for each in kind.__mro__:
            if not each.__flags__ & HEAP or (each is not kind and id(each) in self._seen):
                continue
            self._seen[id(each)] = each
            self._named(each, each.__name__)
            entries = self.found.classes[each] = {}
            self._trusted = is_trusted(file_of(each))
            for name, value in list(vars(each).items()):
                ran = code_of(value)
                if ran is None:
                    read = name in self._names or self._dynamic
                else:
                    read = any(c in self._codes or is_own(c.co_filename) for c in ran)
                if read and name not in OF_CLASSES:
                    if isinstance(value, torch.Tensor):
                        where = f"{name!r} of class {each.__name__}"
                        self._tensor(value, where, of_class(each, name))
                    else:
                        entries[name] = value
                        self._walk(value)
        self._trusted = False
        if type(kind) is not type:
            self.found.kinds.append((weakly(kind), type(kind)))
            self._walk(type(kind))

    def _container(self, value: Any) -> None:
        if self._trusted and len(value) > LIBRARY_ITEMS:
            return
        if len(value) > MOST:
            self._accuse(f"it reads a container of {len(value):,} items")
            return
        kind = type(value)
        if kind not in EXACT:
            self._object(value)
        if isinstance(value, tuple | frozenset):
            for number, each in enumerate(value):
                if isinstance(each, torch.Tensor) and isinstance(value, tuple):
                    self._tensor(each, "a tuple", item(value, number))
                else:
                    self._walk(each)
        elif not value:
            self.found.empty.append(value)
        elif isinstance(value, types.MappingProxyType):
            of = gc.get_referents(value)
            if len(of) == 1 and isinstance(of[0], dict):
                self._walk(of[0])
            else:
                self._unknown(value, "a view of a dict")
        elif isinstance(value, dict):
            if isinstance(value, collections.OrderedDict):  # has an order of its own
                keys = tuple(collections.OrderedDict.keys(value))
                self.found.lists.append((value.keys(), keys, "an OrderedDict that it reads"))
            entries = self.found.entries_of(value, "a dict that it reads")
            entries.keys = tuple(dict.keys(value))
            for name in entries.keys:
                self._walk(name)
                self._hold(value, name, "a dict that it reads")
        else:
            held = []
            for number, each in enumerate(value):
                if isinstance(each, torch.Tensor) and isinstance(value, list):
                    held.append(TENSOR)
                    self._tensor(each, "a list that it reads", item(value, number))
                else:
                    held.append(now := self.found.held(each))
                    if isinstance(now, weakref.ref) and isinstance(each, torch.Tensor):
                        self._tensor(each, "an item that it reads", referent(now))
                    else:
                        self._walk(each)
            self.found.lists.append((value, tuple(held), "a container that it reads"))

    def _object(self, value: object) -> None:
        """Follow an object with attributes."""
        kind = type(value)
        if any(map(is_c, kind.__mro__)):
            self._unknown(value, "an object of a type written in C")
        self._attributes(value)

    def _attributes(self, value: object) -> None:
        """Follow the class of an object, its attributes and its slots."""
        kind, place = type(value), len(self.found.kinds)
        self.found.kinds.append((weakly(value), kind))
        self._walk(kind)
        self._trusted = kind.__module__.partition(".")[0] in ASIDE
        attributes = attributes_of(value)
        where = f"the attributes of a {kind.__name__}"
        if attributes is not None:
            self.found.namespaces.append((place, attributes))
            caches = caches_of(kind) - self._of_modules
            names = self._names - caches if caches else self._names
            dynamic = not self._trusted and self._whole and is_namespace(kind)
            self._namespace(attributes, where, names, caches, dynamic)
        for slot in slots_of(kind):
            if slot.__name__ in self._names or self._dynamic:
                self._slot(value, slot, where)
