"""Ways to change classes, their bases and metaclasses, properties, slots and named tuples."""

from __future__ import annotations

import abc
import functools
import operator
import typing
from typing import Any

import torch

from tests.call.changes import state


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
    class Scaled(abc.ABC):
        @abc.abstractmethod
        def scaled(self) -> float:
            """What an own subclass would have to define."""

    has = A()
    return (
        lambda: 3.0 if isinstance(has, Scaled) else 2.0,
        lambda: Scaled.register(A2) and (setattr(has, "__class__", A2)),
    )
