"""Python state that a backward reads, changed between a map and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd.function import once_differentiable

import shardmap
from shardmap import errors
from tests.same import assert_same
from tests.trace.test_own_backwards import WAYS, W, batch

Tensor = torch.Tensor

STRENGTH = 1.0
SETTINGS = SimpleNamespace(scale=1.0, inner=SimpleNamespace(flag=True))
SHARED = [torch.ones((), dtype=torch.float64)]


class Base(torch.autograd.Function):
    factor = 1.0

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: float = 1.0) -> Tensor:
        ctx.given = given
        return x * 1


class OfAGlobal(Base):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * STRENGTH, None


class OfItsClass(Base):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * OfItsClass.factor, None


class OfAnObject(Base):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad * SETTINGS.scale if SETTINGS.inner.flag else grad), None


class OfATensor(Base):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * SHARED[0], None


class OfItsContext(Base):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.given, None


def _set_global(value: float) -> None:
    global STRENGTH
    STRENGTH = value


CHANGES: dict[type[Base], Callable[[float], None]] = {
    OfAGlobal: _set_global,
    OfItsClass: lambda value: setattr(OfItsClass, "factor", value),
    OfAnObject: lambda value: setattr(SETTINGS, "scale", value),
    OfATensor: lambda value: SHARED.__setitem__(0, torch.tensor(value, dtype=torch.float64)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_refused_and_the_remedies_work(kind: type[Base], way: str) -> None:
    x, change = batch(5, True), CHANGES[kind]
    change(1.0)
    mapped = shardmap.vmap(lambda r: kind.apply(r * W), **WAYS[way])
    out = mapped(x).sum()
    change(2.0)
    with pytest.raises(errors.AutogradFunctionError, match=r"then.*now.*keep it on ctx"):
        torch.autograd.grad(out, x)
    for value in (2.0, 3.0):  # changed before the map: read anew
        change(value)
        (got,) = torch.autograd.grad(mapped(x).sum(), x)
        assert_same(got, value * W.detach().expand(5, 3), f"{value}")
    for value in (2.0, 3.0):
        kept = shardmap.vmap(lambda r, v=value: OfItsContext.apply(r * W, v), **WAYS[way])
        (got,) = torch.autograd.grad(kept(x).sum(), x)
        assert_same(got, value * W.detach().expand(5, 3), f"on ctx, {value}")


def test_what_has_not_changed_or_is_not_read_does_not_matter() -> None:
    x = batch(5, True)
    vector = torch.ones(3, dtype=torch.float64)
    settings = {"scale": 2.0, "other": 1.0}

    class OfAClosure(Base):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad * vector * settings["scale"], None

    for options in WAYS.values():
        out = shardmap.vmap(lambda r: OfAClosure.apply(r * W), **options)(x).sum()
        OfAClosure.unread = 1
        (got,) = torch.autograd.grad(out, x, retain_graph=True)
        assert_same(got, 2 * W.detach().expand(5, 3), "unchanged")
        settings["scale"] = 3.0
        with pytest.raises(
            errors.AutogradFunctionError, match=r"settings\['scale'\] \(2.0 then, 3"
        ):
            torch.autograd.grad(out, x, retain_graph=True)
        settings["scale"] = 2.0
        torch.autograd.grad(out, x)
