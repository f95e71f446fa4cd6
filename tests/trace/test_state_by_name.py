"""Objects whose state a backward or a hook reads, changed between a map and its gradient."""

from __future__ import annotations

import collections
import enum
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors

Tensor = torch.Tensor


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


WAYS = {
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
        lambda: torch.ones(2, dtype=torch.float64),
        lambda o: o,
        lambda o: setattr(o, "data", o.data * 5),
    ),
    "the environment": Way(
        the_environment, lambda _: float(os.environ["SHARDMAP_TEST_SCALE"]), other_environment
    ),
}


def by_backward(way: Way, held: Any) -> Callable[[Tensor], Tensor]:
    read = way.read

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * read(held)

    return lambda r: Scaled.apply(r).sin()


def by_hook(way: Way, held: Any) -> Callable[[Tensor], Tensor]:
    read = way.read

    def function(r: Tensor) -> Tensor:
        h = r * 1
        h.register_hook(lambda g: g * read(held))
        return h.sin()

    return function


@pytest.mark.parametrize("make", [by_backward, by_hook])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"trace": "once"}])
@pytest.mark.parametrize("name", WAYS)
def test_a_change_is_refused_and_without_one_it_is_the_loops(
    name: str, options: dict[str, Any], make: Callable[[Way, Any], Callable[[Tensor], Tensor]]
) -> None:
    way = WAYS[name]
    held = way.make()
    function = make(way, held)
    mapped = shardmap.vmap(function, **options)
    for size in (3, 1, 5):
        x = torch.linspace(0, 1, 2 * size, dtype=torch.float64).view(size, 2).requires_grad_()
        (found,) = torch.autograd.grad(mapped(x).sum(), x)
        (wanted,) = torch.autograd.grad(torch.stack([function(r) for r in x]).sum(), x)
        torch.testing.assert_close(found, wanted)
    out = mapped(x).sum()
    way.change(held)
    with pytest.raises(errors.AutogradFunctionError, match="has changed between the map and its"):
        torch.autograd.grad(out, x)


def test_names_that_an_attrgetter_reads_are_not_followed() -> None:
    held, read = Settings(), operator.attrgetter("a")

    def function(r: Tensor) -> Tensor:
        h = r * 1
        h.register_hook(lambda g: g * read(held))
        return h.sin()

    x = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(errors.AutogradFunctionError, match="an attrgetter, whose names"):
        torch.autograd.grad(shardmap.vmap(function)(x).sum(), x)
