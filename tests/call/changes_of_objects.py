"""Ways to change what a function does between two calls: attributes, classes and references."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from tests.call.changes import Way, way


class Settings:
    kind = "sin"
    by = 2.0

    def __init__(self) -> None:
        self.scale = 2.0
        self.unread = 0

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale

    @property
    def twice(self) -> float:
        return 2 * self.scale

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x * cls.by

    @staticmethod
    def plain(x: Tensor) -> Tensor:
        return x * 3


@way
def attribute() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * settings.scale

    yield f
    settings.scale = 7.0
    yield f


@way
def attribute_of_a_bound_method() -> Way:
    settings = Settings()
    yield settings.apply
    settings.scale = 7.0
    yield settings.apply


@way
def class_attribute() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * settings.by

    yield f
    Settings.by = 5.0
    yield f
    Settings.by = 2.0


@way
def class_attribute_by_class() -> Way:
    def f(x: Tensor) -> Tensor:
        return torch.sin(x) if Settings.kind == "sin" else torch.cos(x)

    yield f
    Settings.kind = "cos"
    yield f
    Settings.kind = "sin"


@way
def class_attribute_shadowed() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * settings.by

    yield f
    settings.by = 9.0
    yield f


@way
def method_replaced() -> Way:
    settings = Settings()
    kept = Settings.apply

    def f(x: Tensor) -> Tensor:
        return settings.apply(x)

    yield f
    Settings.apply = lambda self, x: x - self.scale
    yield f
    Settings.apply = kept


@way
def method_shadowed_by_the_object() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return settings.apply(x)

    yield f
    settings.apply = lambda x: x - 1
    yield f


@way
def method_added_to_a_subclass() -> Way:
    class Sub(Settings):
        pass

    settings = Sub()

    def f(x: Tensor) -> Tensor:
        return settings.apply(x)

    yield f
    Sub.apply = lambda self, x: x - 1
    yield f


@way
def property_replaced() -> Way:
    settings = Settings()
    kept = Settings.twice

    def f(x: Tensor) -> Tensor:
        return x * settings.twice

    yield f
    Settings.twice = property(lambda self: 100.0)
    yield f
    Settings.twice = kept


@way
def classmethod_reads_the_class() -> Way:
    def f(x: Tensor) -> Tensor:
        return Settings.of_class(x)

    yield f
    Settings.by = 4.0
    yield f
    Settings.by = 2.0


@way
def staticmethod_replaced() -> Way:
    kept = Settings.__dict__["plain"]

    def f(x: Tensor) -> Tensor:
        return Settings.plain(x)

    yield f
    Settings.plain = staticmethod(lambda x: x + 3)
    yield f
    Settings.plain = kept


@way
def the_class_of_an_object() -> Way:
    class Other(Settings):
        def apply(self, x: Tensor) -> Tensor:
            return x + self.scale

    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return settings.apply(x)

    yield f
    settings.__class__ = Other
    yield f


@way
def getattr_of_a_class() -> Way:
    class Lazy:
        def __init__(self) -> None:
            self.values = {"scale": 2.0}

        def __getattr__(self, name: str) -> Any:
            return self.__dict__["values"][name]

    lazy = Lazy()

    def f(x: Tensor) -> Tensor:
        return x * lazy.scale

    yield f
    lazy.values["scale"] = 3.0
    yield f


@way
def getattr_by_a_computed_name() -> Way:
    settings = Settings()
    names = ["sc", "ale"]

    def f(x: Tensor) -> Tensor:
        return x * getattr(settings, "".join(names))

    yield f
    settings.scale = 8.0
    yield f


@way
def getattr_by_a_constant_name() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * getattr(settings, "scale", None)

    yield f
    settings.scale = 8.0
    yield f


@way
def hasattr_by_a_constant_name() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * (settings.scale if hasattr(settings, "extra") else 3.0)

    yield f
    settings.extra = True
    yield f


@way
def getattr_with_a_default() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * getattr(settings, "extra", settings.by)

    yield f
    settings.extra = 8.0
    yield f


@way
def getattr_by_a_name_that_is_no_identifier() -> Way:
    settings = Settings()
    vars(settings)["by hand"] = 2.0

    def f(x: Tensor) -> Tensor:
        return x * getattr(settings, "by hand", 1.0)

    yield f
    vars(settings)["by hand"] = 8.0
    yield f


@way
def vars_of_an_object() -> Way:
    settings = Settings()

    def f(x: Tensor) -> Tensor:
        return x * sum(vars(settings).values())

    yield f
    settings.extra = 8.0
    yield f


@way
def slots() -> Way:
    class Slotted:
        __slots__ = ("scale",)

    slotted = Slotted()
    slotted.scale = 2.0

    def f(x: Tensor) -> Tensor:
        return x * slotted.scale

    yield f
    slotted.scale = 3.0
    yield f


@way
def tensor_in_a_slot() -> Way:
    class Slotted:
        __slots__ = ("weight",)

    slotted = Slotted()
    slotted.weight = torch.ones(3)

    def f(x: Tensor) -> Tensor:
        return x * slotted.weight

    yield f
    slotted.weight = torch.arange(3.0)
    yield f


@way
def a_descriptor() -> Way:
    class Reads:
        value = 2.0

        def __get__(self, of: Any, kind: Any) -> float:
            return self.value

    class Has:
        scale = Reads()

    has = Has()

    def f(x: Tensor) -> Tensor:
        return x * has.scale

    yield f
    Has.__dict__["scale"].value = 6.0
    yield f


@way
def a_metaclass() -> Way:
    class Meta(type):
        scale = 2.0

    class Has(metaclass=Meta):
        pass

    def f(x: Tensor) -> Tensor:
        return x * Has.scale

    yield f
    Meta.scale = 5.0
    yield f


@way
def a_cached_property() -> Way:
    class Has:
        @functools.cached_property
        def scale(self) -> float:
            return 2.0

    has = Has()

    def f(x: Tensor) -> Tensor:
        return x * has.scale

    yield f
    has.__dict__["scale"] = 5.0
    yield f


@way
def a_partial() -> Way:
    weight = torch.ones(3)
    part = functools.partial(torch.mul, weight)

    def f(x: Tensor) -> Tensor:
        return part(x)

    yield f
    part = functools.partial(torch.mul, torch.arange(3.0))
    yield f


@way
def a_weak_reference() -> Way:
    class Box:
        scale = 2.0

    boxes = [Box()]
    reference = weakref.ref(boxes[0])

    def f(x: Tensor) -> Tensor:
        box = reference()
        return x * (1.0 if box is None else box.scale)

    yield f
    boxes.clear()
    yield f


@way
def through_a_weak_reference() -> Way:
    class Box:
        def __init__(self) -> None:
            self.scale = 2.0

    box = Box()
    reference = weakref.ref(box)

    def f(x: Tensor) -> Tensor:
        found = reference()
        assert found is not None
        return x * found.scale

    yield f
    box.scale = 3.0
    yield f


@way
def a_weak_dict() -> Way:
    class Key:
        pass

    key = Key()
    table = weakref.WeakKeyDictionary({key: 2.0})

    def f(x: Tensor) -> Tensor:
        return x * table[key]

    yield f
    table[key] = 3.0
    yield f
