"""`trace="once"`: what was recorded is replayed as long as it is still true, and no longer."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardmap
from shardmap.call.reachable import reachable, same
from tests import oracle

Function = Callable[[torch.Tensor], torch.Tensor]
Setup = Callable[[], tuple[Function, Callable[[], Any]]]

x = torch.arange(6.0).view(3, 2) + 1
GLOBAL_NUMBER = 2.0
GLOBAL_TENSOR = torch.tensor([2.0, 3.0])
CHANGES: dict[str, Setup] = {}


@pytest.fixture(autouse=True)
def _globals_are_put_back() -> Iterator[None]:
    saved = GLOBAL_NUMBER, GLOBAL_TENSOR, Base.factor
    yield
    _set(*saved[:2])
    Base.factor = saved[2]


def _set(number: float, tensor: torch.Tensor) -> None:
    global GLOBAL_NUMBER, GLOBAL_TENSOR
    GLOBAL_NUMBER, GLOBAL_TENSOR = number, tensor


class Base:
    """A class of the user's with a method that reads a global."""

    factor = 1.0

    def scaled(self, r: torch.Tensor) -> torch.Tensor:
        return r * GLOBAL_NUMBER * self.factor


class Child(Base):
    """Reads through its base."""


class Slotted:
    """Attributes without a `__dict__`."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class default_dtype:
    """The default dtype, for a while."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.before)


def change(setup: Setup) -> Setup:
    """Registers a function and something that changes what it reads."""
    CHANGES[setup.__name__] = setup
    return setup


def read_global_number(r: torch.Tensor) -> torch.Tensor:
    return r * GLOBAL_NUMBER


@change
def closure_cell() -> Any:
    scale = 2.0

    def function(r: torch.Tensor) -> torch.Tensor:
        return r * scale

    def rebind() -> None:
        nonlocal scale
        scale = 3.0

    return function, rebind


@change
def closure_tensor() -> Any:
    weight = torch.ones(2)

    def rebind() -> None:
        nonlocal weight
        weight = weight - 0.5

    return lambda r: r * weight, rebind


@change
def global_tensor() -> Any:
    return lambda r: r * GLOBAL_TENSOR, lambda: _set(GLOBAL_NUMBER, torch.ones(2))


@change
def global_number() -> Any:
    return lambda r: r * GLOBAL_NUMBER, lambda: _set(5.0, GLOBAL_TENSOR)


@change
def global_of_a_called_function() -> Any:
    return lambda r: read_global_number(r) + 1, lambda: _set(7.0, GLOBAL_TENSOR)


@change
def global_of_a_nested_function() -> Any:
    def function(r: torch.Tensor) -> torch.Tensor:
        return (lambda s: s * GLOBAL_NUMBER)(r)

    return function, lambda: _set(9.0, GLOBAL_TENSOR)


@change
def attribute_number() -> Any:
    settings = types.SimpleNamespace(scale=1.0)
    return lambda r: r * settings.scale, lambda: setattr(settings, "scale", 4.0)


@change
def slot() -> Any:
    settings = Slotted()
    return lambda r: r * settings.scale, lambda: setattr(settings, "scale", 4.0)


@change
def attribute_of_a_base_class() -> Any:
    child = Child()
    return child.scaled, lambda: setattr(Base, "factor", 3.0)


@change
def global_read_by_a_method_of_a_base_class() -> Any:
    child = Child()
    return lambda r: child.scaled(r), lambda: _set(11.0, GLOBAL_TENSOR)


@change
def attribute_of_a_function() -> Any:
    def function(r: torch.Tensor) -> torch.Tensor:
        return r * function.scale  # type: ignore[attr-defined]

    function.scale = 2.0  # type: ignore[attr-defined]
    return function, lambda: setattr(function, "scale", 3.0)


@change
def parameter_replaced() -> Any:
    layer = nn.Linear(2, 2)
    return lambda r: layer(r).detach(), lambda: setattr(
        layer, "weight", nn.Parameter(torch.ones(2, 2))
    )


@change
def module_replaced() -> Any:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    return lambda r: model(r).detach(), lambda: model.__setitem__(1, nn.ReLU())


@change
def list_element() -> Any:
    weights = [torch.ones(2), torch.ones(2)]
    return lambda r: r * weights[0] + weights[1], lambda: weights.__setitem__(1, torch.zeros(2))


@change
def dict_value() -> Any:
    settings = {"scale": 1.0}
    return lambda r: r * settings["scale"], lambda: settings.update(scale=2.0)


@change
def deque_element() -> Any:
    values = collections.deque([1.0])
    return lambda r: r * values[0], lambda: values.__setitem__(0, 2.0)


@change
def array_element() -> Any:
    values = np.ones(2)
    return lambda r: r * float(values[0]), lambda: values.__setitem__(0, 2.0)


@change
def array_made_a_tensor() -> Any:
    values = np.ones(2)
    return lambda r: r * torch.from_numpy(values), lambda: values.__setitem__(0, 2.0)


@change
def default_argument() -> Any:
    def function(r: torch.Tensor, weights: Any = [2.0]) -> torch.Tensor:  # noqa: B006 - the mutable default is what is tested
        return r * weights[0]

    return function, lambda: setattr(function, "__defaults__", ([5.0],))


@change
def argument_of_a_partial() -> Any:
    weights = [2.0]
    return functools.partial(lambda w, r: r * w[0], weights), lambda: weights.__setitem__(0, 3.0)


@change
def attribute_read_by_a_bound_method() -> Any:
    child = Child()
    return child.scaled, lambda: setattr(child, "factor", 3.0)


@change
def attribute_of_a_dict_of_its_own_kind() -> Any:
    class Settings(dict[str, Any]):
        scale = 1.0

    settings = Settings()
    return lambda r: r * settings.scale, lambda: setattr(settings, "scale", 2.0)


@change
def empty_list_filled() -> Any:
    settings = types.SimpleNamespace(extra=[])
    return lambda r: r + sum(settings.extra), lambda: settings.extra.append(2.0)


@change
def evaluation_mode() -> Any:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(1.0)).eval()
    return lambda r: model(r).detach(), model.train


@change
def requires_grad_toggled() -> Any:
    weight = torch.ones(2)
    return lambda r: r * weight, lambda: weight.requires_grad_()


@change
def in_place_update() -> Any:
    weight = torch.ones(2)
    return lambda r: r * weight, lambda: weight.add_(1)


@change
def in_place_update_of_a_number() -> Any:
    weight = torch.ones(2)
    return lambda r: r * weight[0].item(), lambda: weight.add_(1)


@change
def data_of_another_shape() -> Any:
    weight = torch.ones(2)
    return lambda r: r * weight.shape[0] * weight.sum(), lambda: setattr(
        weight, "data", torch.ones(5)
    )


@change
def data_of_another_dtype() -> Any:
    layer = nn.Linear(2, 2)
    return lambda r: layer(r.to(layer.weight.dtype)).detach(), layer.double


@change
def one_to_float() -> Any:
    settings = types.SimpleNamespace(scale=1)
    return lambda r: r.long() * settings.scale, lambda: setattr(settings, "scale", 1.0)


@change
def one_to_true() -> Any:
    settings = types.SimpleNamespace(fill=1)
    return lambda r: torch.full((2,), settings.fill), lambda: setattr(settings, "fill", True)


@change
def zero_to_negative_zero() -> Any:
    settings = types.SimpleNamespace(fill=0.0)
    return lambda r: r / torch.full((2,), settings.fill), lambda: setattr(settings, "fill", -0.0)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    """After a change the result is the loop's, at once and afterwards.

    Fails if the recording goes stale.
    """
    function, rebind = CHANGES[name]()
    mapped = shardmap.vmap(function, trace="once", randomness="same")
    for _ in range(2):
        oracle.assert_same(mapped(x), oracle.loop(function)(x), "before")
    rebind()
    for _ in range(2):
        got, want = mapped(x), oracle.loop(function)(x)
        oracle.assert_same(got, want, "after")
        assert got.requires_grad == want.requires_grad


@pytest.mark.parametrize("name", sorted(set(CHANGES) - {"in_place_update_of_a_number"}))
def test_nothing_changed_is_the_same(name: str) -> None:
    """A listing of the values that a function reads equals itself.

    Nothing in the listing is made anew each time.
    """
    function, _ = CHANGES[name]()
    assert same(reachable(function), reachable(function))


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        functools.partial(default_dtype, torch.float64),
    ],
    ids=["no_grad", "inference_mode", "autocast", "default_dtype"],
)
def test_modes_are_part_of_the_signature(mode: Callable[[], Any]) -> None:
    weight = torch.ones(2, 2, requires_grad=True)

    def function(r: torch.Tensor) -> torch.Tensor:
        return weight @ r + torch.ones(2).to(r.dtype) * torch.ones(()).element_size()

    mapped = shardmap.vmap(function, trace="once")
    mapped(x)
    with mode():
        got, want = mapped(x), oracle.loop(function)(x)
    oracle.assert_same(got, want, "under the mode", torch.bfloat16)
    assert got.requires_grad == want.requires_grad
    oracle.assert_same(mapped(x), oracle.loop(function)(x), "after it")
    assert mapped(x).requires_grad
