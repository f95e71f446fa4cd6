"""Ways of changing state that is seldom thought of as such: contexts, names, keys, flags, modes."""

from __future__ import annotations

import decimal
import functools
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.call.changes import Way, way
from tests.call.changes_unspelled import changing

RATES = {"relu": 2.0, "gelu": 5.0}


class Named(float):
    """A number with a unit."""

    unit: float

    def __new__(cls, value: float, unit: float) -> Named:
        made = super().__new__(cls, value)
        made.unit = unit
        return made


@dataclass(frozen=True)
class Key:
    """A key that is equal to others with another scale."""

    number: int
    scale: float = field(compare=False, default=1.0)


class Array(np.ndarray):
    """An array with attributes."""

    scale: float


class Doubled(TorchFunctionMode):
    """Doubles each sine."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is torch.sin else found


def named(name: str) -> Callable[[], None]:
    def activation() -> None:
        return None

    activation.__name__ = activation.__doc__ = name
    return activation


@way
def the_context_of_decimals() -> Way:
    before = decimal.getcontext()
    third = SimpleNamespace(parts=3)
    yield from changing(
        lambda t: float(Decimal(1) / Decimal(t.parts)),
        third,
        lambda _: decimal.setcontext(decimal.Context(prec=1)),
    )
    decimal.setcontext(before)


@way
def an_equal_number_with_another_attribute() -> Way:
    settings = SimpleNamespace(rate=Named(1.0, 1.0))
    yield from changing(
        lambda s: s.rate.unit, settings, lambda s: setattr(s, "rate", Named(1.0, 0.1))
    )


@way
def an_equal_key_with_another_attribute() -> Way:
    table = {Key(1, 2.0): 0}

    def change(of: dict[Key, int]) -> None:
        of.clear()
        of[Key(1, 7.0)] = 0

    yield from changing(lambda t: sum(key.scale for key in t), table, change)


@way
def the_name_of_a_function() -> Way:
    yield from changing(
        lambda f: RATES[f.__name__], named("relu"), lambda f: setattr(f, "__name__", "gelu")
    )


@way
def the_docstring_of_a_function() -> Way:
    yield from changing(
        lambda f: RATES[f.__doc__], named("relu"), lambda f: setattr(f, "__doc__", "gelu")
    )


@way
def the_name_of_a_class() -> Way:
    class Activation:
        pass

    Activation.__name__ = "relu"
    yield from changing(
        lambda a: RATES[type(a).__name__],
        Activation(),
        lambda a: setattr(type(a), "__name__", "gelu"),
    )


@way
def the_annotations_of_a_class() -> Way:
    class Own:
        first: int

    yield from changing(
        lambda k: len(k.__annotations__), Own, lambda k: k.__annotations__.update(second=int)
    )


@way
def the_hints_of_a_class() -> Way:
    class Own:
        first: int

    yield from changing(
        lambda k: len(typing.get_type_hints(k)),
        Own,
        lambda k: k.__annotations__.update(second=int),
    )


@way
def the_search_for_anomalies() -> Way:
    yield from changing(
        lambda _: 2.0 if torch.is_anomaly_enabled() else 1.0,
        SimpleNamespace(),
        lambda _: torch.autograd.set_detect_anomaly(True),
    )
    torch.autograd.set_detect_anomaly(False)


@way
def an_attribute_of_a_partial() -> Way:
    part = functools.partial(float, 1)
    vars(part)["scale"] = 2.0
    yield from changing(lambda p: p.scale, part, lambda p: setattr(p, "scale", 4.0))


@way
def an_attribute_of_an_array() -> Way:
    array = np.ones(2).view(Array)
    array.scale = 2.0
    yield from changing(lambda a: a.scale, array, lambda a: setattr(a, "scale", 4.0))


@way
def a_flag_of_an_array() -> Way:
    yield from changing(
        lambda a: 2.0 if a.flags.writeable else 3.0,
        np.ones(2),
        lambda a: a.setflags(write=False),
    )


@way
def the_arguments_of_an_error() -> Way:
    yield from changing(lambda e: e.args[0], ValueError(2.0), lambda e: setattr(e, "args", (5.0,)))


@way
def the_state_of_numpys_generator() -> Way:
    before = np.random.get_state()
    np.random.seed(3)
    yield from changing(
        lambda _: float(np.random.get_state(legacy=False)["state"]["key"][0] % 7),
        SimpleNamespace(),
        lambda _: np.random.seed(5),
    )
    np.random.set_state(before)


@way
def a_mode_for_functions() -> Way:
    def f(x: Tensor) -> Tensor:
        return torch.sin(x)

    yield f
    with Doubled():
        yield f
