"""Ways of changing what a function reads by names that its code does not spell out."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import inspect
import operator
import string
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.call.changes import Way, way

HERE = sys.modules[__name__]
SHIFT_ONE = 1.0
TEMPLATE = "{0.w1}"


class Bag:
    """An object with attributes."""

    def __init__(self) -> None:
        self.w1, self.w2 = 1.0, 5.0


class Matched:
    """A class whose patterns take a position."""

    __match_args__: tuple[str, ...] = ("first",)

    def __init__(self) -> None:
        self.first, self.second = 1.0, 3.0


@dataclasses.dataclass
class Rates:
    """Two numbers."""

    rate: float = 1.0
    scale: float = 2.0


def numbered(number: int = 1) -> str:
    return f"w{number}"


def changing(read: Callable[[Any], float], made: Any, change: Callable[[Any], object]) -> Way:
    """A function that scales by what it reads of an object, which is changed."""

    def f(x: Tensor) -> Tensor:
        return x * read(made)

    yield f
    change(made)
    yield f


def grown(bag: Any) -> None:
    bag.w1 = 2.0


@way
def items_of_an_objects_dict() -> Way:
    yield from changing(lambda b: b.__dict__[numbered()], Bag(), grown)


@way
def values_of_an_objects_dict() -> Way:
    yield from changing(lambda b: sum(b.__dict__.values()), Bag(), grown)


@way
def a_path_by_reduce_and_getattr() -> Way:
    outer = types.SimpleNamespace(inner=Bag())
    yield from changing(
        lambda o: functools.reduce(getattr, ("inner." + numbered()).split("."), o),
        outer,
        lambda o: grown(o.inner),
    )


@way
def a_path_by_reduce_in_a_module() -> Way:
    net = nn.Sequential(nn.Linear(3, 3))
    net[0].scale1 = 1.0
    yield from changing(
        lambda n: functools.reduce(getattr, "0.scale1".split("."), n),
        net,
        lambda n: setattr(n[0], "scale1", 2.0),
    )


@way
def an_attrgetter_made_inside() -> Way:
    outer = types.SimpleNamespace(inner=Bag())
    yield from changing(
        lambda o: operator.attrgetter("inner." + numbered())(o), outer, lambda o: grown(o.inner)
    )


@way
def a_path_in_one_text() -> Way:
    outer = types.SimpleNamespace(inner=Bag())
    yield from changing(
        lambda o: operator.attrgetter("inner.w1")(o), outer, lambda o: grown(o.inner)
    )


@way
def a_copy_of_an_object() -> Way:
    yield from changing(lambda b: sum(vars(copy.copy(b)).values()), Bag(), grown)


@way
def a_deep_copy_of_an_object() -> Way:
    yield from changing(lambda r: sum(dataclasses.astuple(copy.deepcopy(r))), Rates(), _faster)


def _faster(rates: Rates) -> None:
    rates.rate = 7.0


@way
def a_dataclass_as_a_tuple() -> Way:
    yield from changing(lambda r: sum(dataclasses.astuple(r)), Rates(), _faster)


@way
def a_dataclass_as_a_dict() -> Way:
    yield from changing(lambda r: sum(dataclasses.asdict(r).values()), Rates(), _faster)


@way
def the_fields_of_a_dataclass() -> Way:
    yield from changing(
        lambda r: sum(getattr(r, field.name) for field in dataclasses.fields(r)), Rates(), _faster
    )


@way
def a_dataclass_replaced() -> Way:
    yield from changing(
        lambda r: sum(dataclasses.astuple(dataclasses.replace(r, scale=1.0))), Rates(), _faster
    )


@way
def an_attribute_in_a_template() -> Way:
    yield from changing(lambda b: float("{b.w1}".format_map({"b": b})), Bag(), grown)


@way
def an_attribute_in_a_template_from_elsewhere() -> Way:
    yield from changing(lambda b: float(TEMPLATE.format(b)), Bag(), grown)


@way
def an_attribute_by_a_formatter() -> Way:
    yield from changing(lambda b: float(string.Formatter().format("{0.w1}", b)), Bag(), grown)


@way
def the_state_of_an_object() -> Way:
    yield from changing(lambda b: sum(b.__getstate__().values()), Bag(), grown)


@way
def a_class_pattern_by_name() -> Way:
    def read(bag: object) -> float:
        match bag:
            case Bag(w1=found):
                return found
        return 0.0

    yield from changing(read, Bag(), grown)


def by_position(value: object) -> float:
    match value:
        case Matched(found):
            return found
    return 0.0


@way
def a_class_pattern_by_position() -> Way:
    yield from changing(by_position, Matched(), lambda m: setattr(m, "first", 2.0))


@way
def the_positions_of_a_class_pattern() -> Way:
    class Own(Matched):
        pass

    def read(value: object) -> float:
        match value:
            case Own(found):
                return found
        return 0.0

    yield from changing(read, Own(), lambda _: setattr(Own, "__match_args__", ("second",)))


@way
def an_attribute_of_a_function() -> Way:
    def noted() -> None:
        return None

    vars(noted)["scale"] = 1.0
    yield from changing(lambda n: n.scale, noted, lambda n: setattr(n, "scale", 2.0))


@way
def attributes_of_a_function_by_a_made_name() -> Way:
    def noted() -> None:
        return None

    vars(noted)["w1"] = 1.0
    yield from changing(lambda n: getattr(n, numbered()), noted, grown)


@way
def the_dict_of_a_class() -> Way:
    class Own:
        w1 = 1.0

    yield from changing(lambda k: k.__dict__[numbered()], Own, grown)


@way
def a_static_attribute_of_a_class() -> Way:
    class Own:
        w1 = 1.0

    yield from changing(lambda k: inspect.getattr_static(k, numbered()), Own, grown)


@way
def a_modules_attribute_by_a_text() -> Way:
    conf = types.ModuleType("conf")
    vars(conf)["w1"] = 1.0

    def read(module: object) -> float:
        name = "w1"
        return getattr(module, name)

    yield from changing(read, conf, grown)


@way
def a_modules_attribute_by_a_made_name() -> Way:
    conf = types.ModuleType("conf")
    vars(conf)["w1"] = 1.0
    yield from changing(lambda m: getattr(m, numbered()), conf, grown)


@way
def this_modules_dict() -> Way:
    def f(x: Tensor) -> Tensor:
        return x * HERE.__dict__["SHIFT_" + "one".upper()]

    yield f
    vars(HERE)["SHIFT_ONE"] = 2.0
    yield f
    vars(HERE)["SHIFT_ONE"] = 1.0


@way
def the_globals_of_another_function() -> Way:
    namespace: dict[str, Any] = {"shift": 1.0}
    exec("def other(): return shift", namespace)
    yield from changing(
        lambda n: n["other"].__globals__["shi" + "ft"],
        namespace,
        lambda n: n.__setitem__("shift", 2.0),
    )


@way
def code_made_from_text() -> Way:
    namespace: dict[str, Any] = {"shift": 1.0}
    exec("def other(x): return x + shift", namespace)
    yield namespace["other"]
    namespace["shift"] = 2.0
    yield namespace["other"]


@way
def code_made_from_text_and_called() -> Way:
    namespace: dict[str, Any] = {"shift": 1.0}
    exec("def other(): return shift", namespace)
    yield from changing(lambda n: n["other"](), namespace, lambda n: n.__setitem__("shift", 2.0))


@way
def a_default_dicts_factory() -> Way:
    def read(table: Any) -> float:
        found = table["missing"]
        del table["missing"]
        return found

    yield from changing(
        read,
        collections.defaultdict(lambda: 1.0),
        lambda t: setattr(t, "default_factory", lambda: 5.0),
    )
