"""Ways to change objects that C keeps the state of, and subclasses of built-in types."""

from __future__ import annotations

import abc
import array
import collections
import contextvars
import decimal
import enum
import fractions
import functools
import itertools
import operator
import random
import re
import string
import threading
import types
import typing
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.call.changes import WAYS, Way


def scaled_by(read: Callable[[], float]) -> Callable[[Tensor], Tensor]:
    """A function that multiplies by a number that is read at each call."""
    return lambda x: x * read()


def register(
    name: str, make: Callable[[], tuple[Callable[[], float], Callable[[], object]]]
) -> None:
    """Register a way.

    Args:
        name: Its name.
        make: Returns a function that reads a number, and one that changes what it reads.
    """

    def made() -> Way:
        read, change = make()
        f = scaled_by(read)
        yield f
        change()
        yield f

    assert name not in WAYS
    made.__module__ = __name__
    WAYS[name] = made


def state(make: Callable[[], Any]) -> Callable[[], Any]:
    """Register a way by the name of what is changed."""
    register(f"state_of_{make.__name__}", make)
    return make


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


# Classes.
class A:
    k = 2.0


class A2:
    k = 3.0


class Z:
    """A class without attributes."""


@state
def the_bases_of_a_class_of_an_object() -> Any:
    class B(A, Z):
        pass

    b = B()
    return lambda: b.k, lambda: setattr(B, "__bases__", (A2, Z))


@state
def the_bases_of_a_base() -> Any:
    class B(A, Z):
        pass

    class C(B):
        pass

    c = C()
    return lambda: c.k, lambda: setattr(B, "__bases__", (A2, Z))


@state
def the_bases_of_a_class_by_its_name() -> Any:
    class B(A, Z):
        pass

    return lambda: B.k, lambda: setattr(B, "__bases__", (A2, Z))


@state
def the_bases_of_a_module_of_torch() -> Any:
    class One:
        def by(self) -> float:
            return 2.0

    class Two:
        def by(self) -> float:
            return 3.0

    class Layer(One, torch.nn.Module):
        pass

    layer = Layer()
    return lambda: layer.by(), lambda: setattr(Layer, "__bases__", (Two, torch.nn.Module))


@state
def an_attribute_of_a_metaclass() -> Any:
    class Meta(type):
        scale = 2.0

    class Has(metaclass=Meta):
        pass

    return lambda: Has.scale, lambda: setattr(Meta, "scale", 3.0)


@state
def a_method_of_a_metaclass() -> Any:
    class Meta(type):
        def __getitem__(cls, key: int) -> float:
            return 2.0

    class Has(metaclass=Meta):
        pass

    return lambda: Has[0], lambda: setattr(Meta, "__getitem__", lambda cls, key: 3.0)


@state
def the_metaclass_of_a_class() -> Any:
    class Meta(type):
        scale = 2.0

    class Meta2(type):
        scale = 3.0

    class Has(metaclass=Meta):
        pass

    return lambda: Has.scale, lambda: setattr(Has, "__class__", Meta2)


@state
def a_special_method() -> Any:
    class Has:
        def __len__(self) -> int:
            return 2

    has = Has()
    return lambda: len(has), lambda: setattr(Has, "__len__", lambda self: 3)


@state
def a_special_value() -> Any:
    class Has:
        __array_priority__ = 2.0

    has = Has()
    return lambda: has.__array_priority__, lambda: setattr(Has, "__array_priority__", 3.0)


@state
def a_class_attribute_with_two_underscores() -> Any:
    class Has:
        __version__ = 2.0

    return lambda: Has.__version__, lambda: setattr(Has, "__version__", 3.0)


@state
def a_property_in_a_class() -> Any:
    class Has:
        by = property(lambda self: 2.0)

    has = Has()
    return lambda: has.by, lambda: setattr(Has, "by", property(lambda self: 3.0))


@state
def a_property_of_a_property() -> Any:
    """The function of a property that is a subclass is another one's."""
    inner = [2.0]

    class Has:
        by = property(operator.attrgetter("scale"))
        scale = property(lambda self: inner[0])

    has = Has()
    return lambda: has.by, lambda: inner.__setitem__(0, 3.0)


@state
def a_static_method_in_a_class() -> Any:
    class Has:
        by = staticmethod(lambda: 2.0)

    return lambda: Has.by(), lambda: setattr(Has, "by", staticmethod(lambda: 3.0))


@state
def a_partial_method() -> Any:
    values = [2.0]

    class Has:
        def of(self, held: list[float]) -> float:
            return held[0]

        by = functools.partialmethod(of, values)

    has = Has()
    return lambda: has.by(), lambda: values.__setitem__(0, 3.0)


@state
def a_single_dispatch() -> Any:
    @functools.singledispatch
    def by(value: object) -> float:
        return 2.0

    return lambda: by(1), lambda: by.register(int, lambda value: 3.0)


@state
def a_cached_property_set() -> Any:
    class Has:
        scale = 2.0

        @functools.cached_property
        def by(self) -> float:
            return self.scale

    has = Has()

    def change() -> None:
        has.scale = 3.0
        del has.by

    return lambda: has.by, change


@state
def a_slot_of_a_base() -> Any:
    class Base:
        __slots__ = ("scale",)

    class Has(Base):
        __slots__ = ()

    has = Has()
    has.scale = 2.0
    return lambda: has.scale, lambda: setattr(has, "scale", 3.0)


@state
def a_private_slot() -> Any:
    class Has:
        __slots__ = ("__scale",)

        def set(self, scale: float) -> None:
            self.__scale = scale

        def get(self) -> float:
            return self.__scale

    has = Has()
    has.set(2.0)
    return lambda: has.get(), lambda: has.set(3.0)


@state
def a_private_slot_of_a_base() -> Any:
    class Base:
        __slots__ = ("__scale",)

        def set(self, scale: float) -> None:
            self.__scale = scale

        def get(self) -> float:
            return self.__scale

    class Has(Base):
        pass

    has = Has()
    has.set(2.0)
    return lambda: has.get(), lambda: has.set(3.0)


@state
def a_slot_that_was_empty() -> Any:
    class Has:
        __slots__ = ("scale",)

    has = Has()

    def read() -> float:
        try:
            return has.scale
        except AttributeError:
            return 2.0

    return read, lambda: setattr(has, "scale", 3.0)


@state
def slots_whose_list_is_gone() -> Any:
    class Has:
        __slots__ = ("scale",)

    has = Has()
    has.scale = 2.0
    del Has.__slots__
    return lambda: has.scale, lambda: setattr(has, "scale", 3.0)


@state
def slots_by_an_iterator() -> Any:
    class Has:
        __slots__ = iter(("scale",))

    has = Has()
    has.scale = 2.0
    return lambda: has.scale, lambda: setattr(has, "scale", 3.0)


@state
def a_dict_replaced() -> Any:
    has = A()
    has.scale = 2.0
    return lambda: has.scale, lambda: setattr(has, "__dict__", {"scale": 3.0})


@state
def a_named_tuple_field() -> Any:
    class Has(typing.NamedTuple):
        scale: list[float]

    has = Has([2.0])
    return lambda: has.scale[0], lambda: has.scale.__setitem__(0, 3.0)


@state
def a_field_of_a_named_tuples_class() -> Any:
    class Has(typing.NamedTuple):
        scale: float

    has = Has(2.0)
    return lambda: has.scale, lambda: setattr(Has, "scale", property(lambda self: 3.0))


@state
def a_virtual_subclass() -> Any:
    class Scaled(abc.ABC):  # noqa: B024 - it is asked for, and has nothing to do
        pass

    has = A()
    return (
        lambda: 3.0 if isinstance(has, Scaled) else 2.0,
        lambda: Scaled.register(A2) and (setattr(has, "__class__", A2)),
    )


# Objects of python's library.
@state
def the_arguments_of_an_exception() -> Any:
    error = ValueError(2.0)
    return lambda: error.args[0], lambda: setattr(error, "args", (3.0,))


@state
def the_number_of_an_os_error() -> Any:
    error = OSError(2, "gone")
    return lambda: error.errno, lambda: setattr(error, "errno", 3)


@state
def the_value_of_a_stop_iteration() -> Any:
    error = StopIteration(2.0)
    return lambda: error.value, lambda: setattr(error, "value", 3.0)


@state
def the_cause_of_an_exception() -> Any:
    error = ValueError()
    error.__cause__ = KeyError(2.0)
    return lambda: error.__cause__.args[0], lambda: setattr(error, "__cause__", KeyError(3.0))


@state
def the_arguments_of_an_own_exception() -> Any:
    class Failed(Exception):
        pass

    error = Failed(2.0)
    return lambda: error.args[0], lambda: setattr(error, "args", (3.0,))


@state
def the_notes_of_an_exception() -> Any:
    error = ValueError()
    error.add_note("a")
    return lambda: len(error.__notes__) + 1.0, lambda: error.add_note("b")


@state
def the_state_of_a_partial() -> Any:
    part = functools.partial(max, 2.0)
    return lambda: part(1.0), lambda: part.__setstate__((max, (3.0,), {}, {}))


@state
def the_keywords_of_a_partial() -> Any:
    part = functools.partial(dict, a=2.0)
    return lambda: part()["a"], lambda: part.keywords.update(a=3.0)


@state
def the_factory_of_a_default_dict() -> Any:
    made = collections.defaultdict(lambda: 2.0, {"a": 1.0})
    return lambda: made.default_factory(), lambda: setattr(made, "default_factory", lambda: 3.0)


@state
def the_factory_of_an_empty_default_dict() -> Any:
    made = collections.defaultdict(lambda: 2.0)
    return lambda: made.default_factory(), lambda: setattr(made, "default_factory", lambda: 3.0)


@state
def the_factory_that_is_called_by_itself() -> Any:
    made = collections.defaultdict(lambda: 2.0)

    def change() -> None:
        made.clear()
        made.default_factory = lambda: 3.0

    return lambda: made["a"], change


@state
def a_mapping_proxy() -> Any:
    table = {"a": 2.0}
    proxy = types.MappingProxyType(table)
    return lambda: proxy["a"], lambda: table.update(a=3.0)


@state
def a_namespace() -> Any:
    made = types.SimpleNamespace(a=2.0)
    return lambda: made.a, lambda: setattr(made, "a", 3.0)


@state
def a_deque_that_turns() -> Any:
    made = collections.deque([2.0, 3.0])
    return lambda: made[0], lambda: made.rotate(1)


@state
def an_ordered_dict_that_turns() -> Any:
    made = collections.OrderedDict(a=2.0, b=3.0)
    return lambda: next(iter(made.values())), lambda: made.move_to_end("a")


@state
def a_chain_map() -> Any:
    first, second = {}, {"a": 2.0}
    made = collections.ChainMap(first, second)
    return lambda: made["a"], lambda: first.update(a=3.0)


@state
def the_maps_of_a_chain_map() -> Any:
    made = collections.ChainMap({"a": 2.0})
    return lambda: made["a"], lambda: setattr(made, "maps", [{"a": 3.0}])


@state
def a_user_dict() -> Any:
    made = collections.UserDict(a=2.0)
    return lambda: made["a"], lambda: made.update(a=3.0)


@state
def an_array_of_python() -> Any:
    made = array.array("d", [2.0])
    return lambda: made[0], lambda: made.__setitem__(0, 3.0)


@state
def a_byte_array() -> Any:
    made = bytearray(b"\x02")
    return lambda: made[0], lambda: made.__setitem__(0, 3)


@state
def a_memory_view() -> Any:
    memory = bytearray(b"\x02")
    made = memoryview(memory)
    return lambda: made[0], lambda: memory.__setitem__(0, 3)


@state
def a_memory_view_of_an_array() -> Any:
    memory = np.array([2.0, 5.0])
    made = memoryview(memory)
    return lambda: made[0], lambda: memory.__setitem__(0, 3.0)


@state
def a_weak_reference_to_an_object() -> Any:
    target = A()
    target.scale = 2.0
    reference = weakref.ref(target)
    return lambda: reference().scale, lambda: setattr(target, "scale", 3.0)


@state
def a_weak_proxy() -> Any:
    target = A()
    target.scale = 2.0
    proxy = weakref.proxy(target)
    return lambda: proxy.scale, lambda: setattr(target, "scale", 3.0)


@state
def a_weak_set() -> Any:
    targets = [A(), A()]
    held = weakref.WeakSet(targets[:1])
    return lambda: len(held) + 1.0, lambda: held.add(targets[1])


@state
def a_weak_value_dict() -> Any:
    targets = [A(), A()]
    targets[0].scale, targets[1].scale = 2.0, 3.0
    held = weakref.WeakValueDictionary(a=targets[0])
    return lambda: held["a"].scale, lambda: held.update(a=targets[1])


@state
def a_weak_method() -> Any:
    class Has:
        scale = 2.0

        def get(self) -> float:
            return self.scale

    has = Has()
    reference = weakref.WeakMethod(has.get)
    return lambda: reference()(), lambda: setattr(has, "scale", 3.0)


@state
def a_context_variable() -> Any:
    variable: contextvars.ContextVar[float] = contextvars.ContextVar("scale")
    variable.set(2.0)
    return lambda: variable.get(), lambda: variable.set(3.0)


@state
def a_context_copied() -> Any:
    variable: contextvars.ContextVar[float] = contextvars.ContextVar("scale")
    context = contextvars.copy_context()
    context.run(variable.set, 2.0)
    return lambda: context[variable], lambda: context.run(variable.set, 3.0)


@state
def a_thread_local() -> Any:
    local = threading.local()
    local.scale = 2.0
    return lambda: local.scale, lambda: setattr(local, "scale", 3.0)


@state
def a_pattern() -> Any:
    found = [re.compile("a+")]
    return lambda: float(len(found[0].match("aab")[0])), lambda: found.__setitem__(
        0, re.compile("a")
    )


@state
def a_lock() -> Any:
    lock = threading.Lock()
    return lambda: 3.0 if lock.locked() else 2.0, lambda: lock.acquire()


@state
def an_event() -> Any:
    event = threading.Event()
    return lambda: 3.0 if event.is_set() else 2.0, event.set


@state
def an_event_that_is_waited_for() -> Any:
    event = threading.Event()
    return lambda: 3.0 if event.wait(0.0) else 2.0, event.set


@state
def a_semaphore() -> Any:
    held = threading.Semaphore(3)
    return lambda: float(held._value), lambda: held.acquire()


@state
def the_doc_of_a_property() -> Any:
    held = property(lambda self: 1.0, doc="a")
    return lambda: 1.0 + len(held.__doc__ or ""), lambda: held.__init__(lambda self: 1.0, doc="ab")


@state
def a_property_made_again() -> Any:
    class Has:
        by = property(lambda self: 2.0)

    has = Has()
    return lambda: has.by, lambda: vars(Has)["by"].__init__(lambda self: 3.0)


@state
def a_static_method_made_again() -> Any:
    class Has:
        by = staticmethod(lambda: 2.0)

    return lambda: Has.by(), lambda: vars(Has)["by"].__init__(lambda: 3.0)


@state
def a_method_of_a_list() -> Any:
    held = [2.0]
    get = held.__getitem__
    return lambda: get(0), lambda: held.__setitem__(0, 3.0)


@state
def a_method_of_an_array() -> Any:
    held = np.array([2.0])
    get = held.item
    return lambda: get(0), lambda: held.__setitem__(0, 3.0)


@state
def a_method_of_a_tensor() -> Any:
    held = torch.tensor([2.0])
    get = held.sum
    return lambda: get(), lambda: held.add_(1.0)


@state
def an_attribute_getter() -> Any:
    has = A()
    has.scale = 2.0
    get = operator.attrgetter("scale")
    return lambda: get(has), lambda: setattr(has, "scale", 3.0)


@state
def a_method_caller() -> Any:
    held = [2.0]
    get = operator.methodcaller("__getitem__", 0)
    return lambda: get(held), lambda: held.__setitem__(0, 3.0)


@state
def the_argument_of_a_method_caller() -> Any:
    held = [2.0]
    get = operator.methodcaller("__add__", held)
    return lambda: get([1.0])[1], lambda: held.__setitem__(0, 3.0)


@state
def a_view_of_a_dict() -> Any:
    held = {"a": 2.0}
    values = held.values()
    return lambda: sum(values), lambda: held.update(a=3.0)


@state
def the_keys_of_a_dict() -> Any:
    held = {"a": 2.0}
    keys = held.keys()
    return lambda: len(keys) + 1.0, lambda: held.update(b=3.0)


@state
def a_slice_of_lists() -> Any:
    held = [2.0]
    part = slice(held, None)
    return lambda: part.start[0], lambda: held.__setitem__(0, 3.0)


@state
def a_cell() -> Any:
    cell = types.CellType(2.0)
    return lambda: cell.cell_contents, lambda: setattr(cell, "cell_contents", 3.0)


@state
def a_generic_alias() -> Any:
    made = list[A]
    return lambda: made.__args__[0].k, lambda: made.__args__[0].__dict__ and setattr(A, "k", 3.0)


@state
def getattr_of_a_module() -> Any:
    module = types.ModuleType("lazy_module_of_a_test")
    table = {"scale": 2.0}
    module.__getattr__ = lambda name: table[name]
    return lambda: module.scale, lambda: table.update(scale=3.0)


@state
def another_getattr_of_a_module() -> Any:
    module = types.ModuleType("lazy_module_of_a_test")
    module.__getattr__ = lambda name: 2.0
    return lambda: module.scale, lambda: setattr(module, "__getattr__", lambda name: 3.0)


@state
def the_class_of_a_module() -> Any:
    class One(types.ModuleType):
        scale = 2.0

    class Two(types.ModuleType):
        scale = 3.0

    module = One("module_of_a_test")
    return lambda: module.scale, lambda: setattr(module, "__class__", Two)


# Objects of numpy and torch.
@state
def a_numpy_array() -> Any:
    held = np.array([2.0])
    return lambda: float(held[0]), lambda: held.__setitem__(0, 3.0)


@state
def a_structured_array() -> Any:
    held = np.zeros(2, dtype=[("a", "f8"), ("b", "i4")])
    held["a"][0] = 2.0
    return lambda: float(held["a"][0]), lambda: held["a"].__setitem__(0, 3.0)


@state
def a_structured_scalar() -> Any:
    held = np.zeros(2, dtype=[("a", "f8")])
    one = held[0]
    held["a"] = 2.0
    return lambda: float(one["a"]), lambda: one.__setitem__("a", 3.0)


@state
def a_record() -> Any:
    held = np.rec.array([(2.0,)], dtype=[("a", "f8")])
    one = held[0]
    return lambda: float(one.a), lambda: setattr(one, "a", 3.0)


@state
def the_names_of_a_dtype() -> Any:
    held = np.dtype([("a", "f8")])
    return lambda: 1.0 + len(held.names[0]), lambda: setattr(held, "names", ("ab",))


@state
def an_array_of_objects() -> Any:
    inner = [2.0]
    held = np.array([None], dtype=object)
    held[0] = inner
    return lambda: held[0][0], lambda: inner.__setitem__(0, 3.0)


@state
def a_masked_array() -> Any:
    held = np.ma.array([2.0, 1.0], mask=[False, False])
    return lambda: float(held.sum()), lambda: held.__setitem__(1, np.ma.masked)


@state
def a_view_of_memory_of_numpy() -> Any:
    memory = np.array([2.0, 1.0])
    held = memory[:1]
    return lambda: float(held[0]), lambda: memory.__setitem__(0, 3.0)


@state
def an_iterator_of_numpy() -> Any:
    memory = np.array([2.0, 1.0])
    held = memory.flat
    return lambda: float(held[0]), lambda: memory.__setitem__(0, 3.0)


@state
def an_iterator_with_a_state() -> Any:
    held = itertools.cycle([2.0, 3.0, 4.0])
    pair = [next(held), held]
    return lambda: pair[0], lambda: pair.__setitem__(0, next(held))


@state
def a_generator_that_has_ended() -> Any:
    def counting() -> Any:
        yield 1.0

    held = counting()
    return lambda: 3.0 if held.gi_frame is None else 2.0, lambda: list(held)


@state
def what_is_left_of_an_iterator() -> Any:
    held = iter([1.0, 2.0])
    return lambda: 1.0 + operator.length_hint(held), lambda: next(held)


@state
def the_state_of_a_torch_generator() -> Any:
    held = torch.Generator().manual_seed(2)
    return lambda: float(held.initial_seed() + 1), lambda: held.manual_seed(3)


@state
def an_attribute_of_a_tensor_of_a_class() -> Any:
    class Held(Tensor):
        scale = 2.0

    held = torch.ones(()).as_subclass(Held)
    return lambda: held.scale, lambda: setattr(Held, "scale", 3.0)


@state
def the_class_of_a_tensor() -> Any:
    class Held(Tensor):
        scale = 2.0

    class Other(Tensor):
        scale = 3.0

    held = torch.ones(()).as_subclass(Held)
    return lambda: held.scale, lambda: setattr(held, "__class__", Other)


@state
def the_name_of_a_tensor() -> Any:
    held = torch.ones((), requires_grad=True)
    held.grad = torch.tensor(2.0)
    return lambda: held.grad.clone(), lambda: held.grad.add_(1.0)
