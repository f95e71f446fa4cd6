"""Python state that a backward or a hook reads by name, changed before the gradient is taken."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import enum
import functools
import logging
import operator
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from shardmap.program import python_state
from tests.trace.gradient_readers import (
    Case,
    Function,
    Tensor,
    as_a_backward,
    as_a_hook,
    each_way,
    loop,
    rows,
)


class Way(NamedTuple):
    """An object, what is read of it, and how it is changed."""

    make: Callable[[], Any]
    read: Callable[[Any], float | Tensor]
    change: Callable[[Any], object]


@dataclass
class Settings:
    a: float = 1.0

    def scaled(self) -> float:
        return self.a * 2


class Layer(nn.Module):
    a = 1.0


class Kind(enum.Enum):
    FIRST = 1


def set_a(o: Any) -> None:
    o.a = 5.0


def a_layer() -> Layer:
    layer = Layer()
    layer.a = 2.0
    return layer


def a_member() -> Kind:
    Kind.FIRST.a = 1.0
    return Kind.FIRST


def the_environment() -> None:
    os.environ["SHARDMAP_TEST_SCALE"] = "1"


def other_environment(_: object) -> None:
    os.environ["SHARDMAP_TEST_SCALE"] = "5"


OBJECTS = {
    "a field of a dataclass": Way(Settings, lambda o: o.a, set_a),
    "read by a method": Way(Settings, lambda o: o.scaled(), set_a),
    "an attribute of a module": Way(a_layer, lambda o: o.a, set_a),
    "set later": Way(Layer, lambda o: o.a, set_a),
    "of a member of an enumeration": Way(a_member, lambda o: o.a, set_a),
    "a fraction": Way(
        lambda: [Fraction(1, 2)],
        lambda o: float(o[0]),
        lambda o: o.__setitem__(0, Fraction(3, 2)),
    ),
    "the order of an ordered dict": Way(
        lambda: collections.OrderedDict(a=1.0, b=2.0),
        lambda o: next(iter(o.values())),
        lambda o: o.move_to_end("a"),
    ),
    "a view of a dict's values": Way(
        lambda: [d := {"a": 1.0}, d.values()],
        lambda o: sum(o[1]),
        lambda o: o[0].update(a=5.0),
    ),
    "an exception": Way(
        lambda: ValueError(1.0), lambda o: o.args[0], lambda o: setattr(o, "args", (5.0,))
    ),
    "other memory of a tensor": Way(
        lambda: torch.ones(3, dtype=torch.float64),
        lambda o: o,
        lambda o: setattr(o, "data", o.data * 5),
    ),
    "the environment": Way(
        the_environment, lambda _: float(os.environ["SHARDMAP_TEST_SCALE"]), other_environment
    ),
}


class Mode(enum.Enum):
    ONE = 1
    TWO = 2


def an_enum_member() -> Case:
    o = SimpleNamespace(mode=Mode.ONE)
    return lambda g: g if o.mode is Mode.ONE else -g, lambda: setattr(o, "mode", Mode.TWO)


def a_function_of_torch() -> Case:
    o = SimpleNamespace(f=torch.sin)
    return lambda g: o.f(g), lambda: setattr(o, "f", torch.cos)


def a_set() -> Case:
    s = {1}
    return lambda g: g * 2 if 3 in s else g, lambda: s.add(3)


def an_array() -> Case:
    a = np.ones(3)
    return lambda g: g * float(a[1]), lambda: a.__setitem__(1, 7)


def a_deque() -> Case:
    d = collections.deque([1.0, 2.0], maxlen=2)
    return lambda g: g * d[0], lambda: d.append(3.0)


def an_attribute_that_is_computed() -> Case:
    class Holder:
        def __init__(self) -> None:
            self.d = {"k": 2.0}

        def __getattr__(self, name: str) -> float:
            return self.d[name]

    h = Holder()
    return lambda g: g * h.k, lambda: h.d.update(k=9.0)


def a_length() -> Case:
    class Sized:
        def __init__(self) -> None:
            self.items = [1.0]

        def __len__(self) -> int:
            return len(self.items)

    z = Sized()
    return lambda g: g * len(z), lambda: z.items.append(1.0)


def what_a_called_function_closes_over() -> Case:
    b = [2.0]

    def inner() -> float:
        return b[0]

    def outer(g: Tensor) -> Tensor:
        return g * inner()

    return outer, lambda: b.__setitem__(0, 9.0)


def an_attribute_by_getattr() -> Case:
    q = SimpleNamespace(k=2.0)
    return lambda g: g * getattr(q, "k", 1.0), lambda: setattr(q, "k", 9.0)


def an_attribute_by_a_computed_name() -> Case:
    q, names = SimpleNamespace(k1=2.0), SimpleNamespace(first="k")
    return lambda g: g * getattr(q, names.first + "1"), lambda: setattr(q, "k1", 9.0)


def an_attribute_that_is_not_there() -> Case:
    e = SimpleNamespace()
    return lambda g: g * 3 if hasattr(e, "k") else g, lambda: setattr(e, "k", 9.0)


def requires_grad() -> Case:
    w = torch.randn(4, requires_grad=True)
    return lambda g: g * 2 if w.requires_grad else g, lambda: w.requires_grad_(False)


def a_default() -> Case:
    def called(g: Tensor, k: float = 2.0) -> Tensor:
        return g * k

    return called, lambda: setattr(called, "__defaults__", (9.0,))


def the_order_of_a_dict() -> Case:
    d = {"a": 1.0, "b": 2.0}

    def called(g: Tensor) -> Tensor:
        for v in d.values():
            g = g * v + 1
        return g

    return called, lambda: d.update(a=d.pop("a"))


def a_variable_that_holds_an_object() -> Case:
    held = SimpleNamespace(k=2.0)

    def change() -> None:
        nonlocal held
        held = SimpleNamespace(k=9.0)

    return lambda g: g * held.k, change


def a_context_variable() -> Case:
    v = contextvars.ContextVar("v", default=2.0)
    return lambda g: g * v.get(), lambda: v.set(9.0)


def something_deep() -> Case:
    o = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=[{"k": SimpleNamespace(d=2.0)}])))
    return lambda g: g * o.a.b.c[0]["k"].d, lambda: setattr(o.a.b.c[0]["k"], "d", 9.0)


def a_variable_of_this_thread() -> Case:
    o = threading.local()
    o.k = 2.0
    return lambda g: g * o.k, lambda: setattr(o, "k", 9.0)


def the_end_of_a_long_list() -> Case:
    numbers = [2.0] * 1000
    return lambda g: g * numbers[-1], lambda: numbers.__setitem__(-1, 9.0)


def a_partial() -> Case:
    o = SimpleNamespace(f=functools.partial(torch.mul, other=2.0))
    return lambda g: o.f(g), lambda: setattr(o, "f", functools.partial(torch.mul, other=9.0))


def a_comparison() -> Case:
    @dataclasses.dataclass
    class Setting:
        level: int

    one, other = Setting(1), Setting(1)
    return lambda g: g * 3 if one == other else g, lambda: setattr(other, "level", 2)


def a_module_that_is_called() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strength = 2.0

        def forward(self, g: Tensor) -> Tensor:
            return g * self.strength

    net = nn.Sequential(Net())
    return lambda g: net(g), lambda: setattr(net[0], "strength", 9.0)


CASES = [
    an_enum_member, a_function_of_torch, a_set, an_array, a_deque, an_attribute_that_is_computed,
    a_length, what_a_called_function_closes_over, an_attribute_by_getattr,
    an_attribute_by_a_computed_name, an_attribute_that_is_not_there, requires_grad, a_default,
    the_order_of_a_dict, a_variable_that_holds_an_object, a_context_variable, something_deep,
    a_variable_of_this_thread, the_end_of_a_long_list, a_partial, a_comparison, a_module_that_is_called,
]  # fmt: skip


def of_object(name: str) -> Callable[[], Case]:
    """The case of one of the objects."""

    def case() -> Case:
        way = OBJECTS[name]
        held = way.make()
        return lambda g: g * way.read(held), lambda: way.change(held)

    case.__name__ = name
    return case


@each_way
@pytest.mark.parametrize("case", [*CASES, *map(of_object, OBJECTS)], ids=lambda case: case.__name__)
@pytest.mark.parametrize("reader", [as_a_backward, as_a_hook])
def test_a_change_before_the_gradient_is_refused(
    reader: Callable[[Function], Function],
    case: Callable[[], Case],
    options: dict[str, Any],
) -> None:
    called, change = case()
    function = reader(called)
    mapped = shardmap.vmap(function, **options)
    x = rows()
    for _ in range(4):
        (got,) = torch.autograd.grad(mapped(x).sum(), x)
        (want,) = torch.autograd.grad(loop(function)(x).sum(), x)
        torch.testing.assert_close(got, want)
    out = mapped(x).sum()
    change()
    with pytest.raises(errors.AutogradFunctionError, match="changed between the map and its"):
        torch.autograd.grad(out, x)
    (got,) = torch.autograd.grad(shardmap.vmap(function, **options)(x).sum(), x)
    (want,) = torch.autograd.grad(loop(function)(x).sum(), x)
    torch.testing.assert_close(got, want)


@each_way
def test_a_setting_of_torch(options: dict[str, Any]) -> None:
    def called(g: Tensor) -> Tensor:
        return g * 2 if torch.are_deterministic_algorithms_enabled() else g

    x = rows()
    out = shardmap.vmap(as_a_hook(called), **options)(x).sum()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(errors.AutogradFunctionError, match="are_deterministic"):
            torch.autograd.grad(out, x)
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_iterator_is_refused() -> None:
    numbers: Iterator[float] = iter([1.0, 2.0] * 50)
    x = rows()
    with pytest.raises(errors.ShardmapError):
        torch.autograd.grad(shardmap.vmap(as_a_hook(lambda g: g * next(numbers)))(x).sum(), x)


def test_methods_that_do_not_run_are_not_read() -> None:
    """The forward of a module that a hook reads a number of, a state that no gradient needs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.calls = 2.0, 0

        def forward(self, r: Tensor) -> Tensor:
            h = r * 2 if self.calls >= 0 else r
            h.register_hook(lambda g: g * self.scale)
            return h * 1

    net, x = Net(), rows()
    out = shardmap.vmap(net)(x).sum()
    net.calls += 1
    torch.testing.assert_close(torch.autograd.grad(out, x)[0], torch.full_like(x, 4))


def test_layers_with_one_hook_are_read_once_each() -> None:
    class Scale:
        k = 1.0

    def function(r: Tensor) -> Tensor:
        scale = Scale()
        for _ in range(30):
            r = r * 1
            r.register_hook(lambda g: g * scale.k)
        return r

    x, mapped = rows(), shardmap.vmap(function)
    for _ in range(4):
        out = mapped(x)
        (got,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(got, torch.ones_like(x))
    (name,) = [name for name in python_state._readers if "read_once_each" in name]
    assert len(python_state.readers_named(name)) <= 2


def test_what_does_not_matter_may_change() -> None:
    """Other attributes, equal numbers, objects that are made anew with equal contents."""
    o = SimpleNamespace(k=2.0, steps=0, settings={"a": 1.0}, sizes=[1, 2])
    x = rows()
    out = shardmap.vmap(as_a_hook(lambda g: g * o.k * o.settings["a"] + o.sizes[1]))(x).sum()
    o.steps, o.k, o.settings, o.sizes = 5, float("2"), {"a": 1.0}, [1, 2]
    (got,) = torch.autograd.grad(out, x)
    torch.testing.assert_close(got, torch.full_like(x, 2 * (2.0 + 2)))


@each_way
def test_a_logger_and_a_lock(options: dict[str, Any]) -> None:
    logger, lock = logging.getLogger("of a hook"), threading.Lock()

    def called(g: Tensor) -> Tensor:
        with lock:
            logger.debug("a gradient of shape %s", g.shape)
        return g * 2

    x = rows()
    out = shardmap.vmap(as_a_hook(called), **options)(x).sum()
    logger.setLevel(logging.INFO)
    logger.info("between")
    torch.testing.assert_close(torch.autograd.grad(out, x)[0], torch.full_like(x, 4))


def test_names_that_an_attrgetter_reads_are_not_followed() -> None:
    held, read = Settings(), operator.attrgetter("a")

    def function(r: Tensor) -> Tensor:
        h = r * 1
        h.register_hook(lambda g: g * read(held))
        return h.sin()

    x = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(errors.AutogradFunctionError, match="an attrgetter, whose names"):
        torch.autograd.grad(shardmap.vmap(function)(x).sum(), x)
