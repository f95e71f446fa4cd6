"""Ways to change subclasses of built-in types, whose values compare equal, and enumerations."""

from __future__ import annotations

import array
import collections
import decimal
import enum
import fractions
import functools
import itertools
import random
import string
import threading
import types
import weakref
from typing import Any

import numpy as np

from tests.call.changes import register, state

# Attributes of subclasses of built-in types, whose values compare equal.
_FINAL = (bool, type(None), range, slice)
_BUILT_IN: dict[str, tuple[type, tuple[Any, ...]]] = {
    "float": (float, (2.0,)),
    "int": (int, (2,)),
    "complex": (complex, (2.0,)),
    "str": (str, ("a",)),
    "bytes": (bytes, (b"a",)),
    "tuple": (tuple, ((1, 2),)),
    "list": (list, ([1, 2],)),
    "empty_list": (list, ()),
    "dict": (dict, ({"a": 1},)),
    "empty_dict": (dict, ()),
    "set": (set, ({1},)),
    "frozenset": (frozenset, ({1},)),
    "bytearray": (bytearray, (b"a",)),
    "deque": (collections.deque, ([1],)),
    "ordered_dict": (collections.OrderedDict, ({"a": 1},)),
    "default_dict": (collections.defaultdict, (int,)),
    "counter": (collections.Counter, ("aab",)),
    "user_dict": (collections.UserDict, ({"a": 1},)),
    "user_list": (collections.UserList, ([1],)),
    "chain_map": (collections.ChainMap, ({"a": 1},)),
    "array": (array.array, ("d", [1.0])),
    "partial": (functools.partial, (max, 1)),
    "error": (ValueError, (1,)),
    "namespace": (types.SimpleNamespace, ()),
    "module": (types.ModuleType, ("module_of_a_test",)),
    "property": (property, (len,)),
    "weak": (weakref.ref, (register,)),
    "fraction": (fractions.Fraction, (1, 2)),
    "decimal": (decimal.Decimal, (1,)),
    "random": (random.Random, (1,)),
    "type": (type, ("K", (), {})),
    "float64": (np.float64, (2.0,)),
    "int64": (np.int64, (2,)),
    "thread_local": (threading.local, ()),
    "iterator": (itertools.count, (1,)),
    "template": (string.Template, ("$a",)),
}


def _of_instance(kind: type, values: tuple[Any, ...]) -> Any:
    held = type("Held", (kind,), {"__hash__": object.__hash__})(*values)
    held.scale = 2.0
    return lambda: held.scale, lambda: setattr(held, "scale", 3.0)


def _of_class(kind: type, values: tuple[Any, ...]) -> Any:
    made = type("Held", (kind,), {"scale": 2.0, "__hash__": object.__hash__})
    held = made(*values)
    return lambda: held.scale, lambda: setattr(made, "scale", 3.0)


def _by_method(kind: type, values: tuple[Any, ...]) -> Any:
    made = type("Held", (kind,), {"by": lambda self: 2.0, "__hash__": object.__hash__})
    held = made(*values)
    return lambda: held.by(), lambda: setattr(made, "by", lambda self: 3.0)


def _in_a_list(kind: type, values: tuple[Any, ...]) -> Any:
    held = [type("Held", (kind,), {"__hash__": object.__hash__})(*values)]
    held[0].scale = 2.0
    return lambda: held[0].scale, lambda: setattr(held[0], "scale", 3.0)


def _in_a_tuple(kind: type, values: tuple[Any, ...]) -> Any:
    held = ((type("Held", (kind,), {"__hash__": object.__hash__})(*values),),)
    held[0][0].scale = 2.0
    return lambda: held[0][0].scale, lambda: setattr(held[0][0], "scale", 3.0)


def _as_a_key(kind: type, values: tuple[Any, ...]) -> Any:
    held = {type("Held", (kind,), {"__hash__": object.__hash__})(*values): 1}
    (key,) = held
    key.scale = 2.0
    return lambda: next(iter(held)).scale, lambda: setattr(key, "scale", 3.0)


def _in_another(kind: type, values: tuple[Any, ...]) -> Any:
    """An attribute of an attribute of another one."""
    made = type("Held", (kind,), {"__hash__": object.__hash__})
    held, inner = made(*values), made(*values)
    inner.scale = 2.0
    held.inner = inner
    return lambda: held.inner.scale, lambda: setattr(inner, "scale", 3.0)


def _replaced_by_an_equal(kind: type, values: tuple[Any, ...]) -> Any:
    made = type("Held", (kind,), {"__hash__": kind.__hash__})
    first, other = made(*values), made(*values)
    first.scale, other.scale = 2.0, 3.0
    held = [first]
    return lambda: held[0].scale, lambda: held.__setitem__(0, other)


for _kind, (_type, _values) in _BUILT_IN.items():
    for _how in (
        _of_instance,
        _of_class,
        _by_method,
        _in_a_list,
        _in_a_tuple,
        _as_a_key,
        _in_another,
        _replaced_by_an_equal,
    ):
        register(f"{_kind}{_how.__name__}", functools.partial(_how, _type, _values))


# Members of enumerations.
@state
def an_int_enum_member() -> Any:
    made = enum.IntEnum("Mode", "A B")
    made.A.scale = 2.0
    return lambda: made.A.scale, lambda: setattr(made.A, "scale", 3.0)


@state
def a_str_enum_member() -> Any:
    made = enum.Enum("Mode", {"A": "a"}, type=str)
    made.A.scale = 2.0
    held = made.A
    return lambda: held.scale, lambda: setattr(held, "scale", 3.0)


@state
def a_flag_member() -> Any:
    made = enum.IntFlag("Mode", "A B")
    held = made.A | made.B
    held.scale = 2.0
    return lambda: held.scale, lambda: setattr(held, "scale", 3.0)


@state
def the_value_of_an_enum_member() -> Any:
    made = enum.Enum("Mode", {"A": 2.0})
    held = made.A
    return lambda: held.value, lambda: setattr(held, "_value_", 3.0)
