"""Forward mode around maps of Functions with a `jvp`, and of modes: under `torch.no_grad()` too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import shardmap
from shardmap import errors
from tests.same import assert_same

Tensor = torch.Tensor
DTYPE = torch.float64
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"chunk_size": 2},
    "lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
}


class Negated(torch.autograd.Function):
    """A view with another derivative, that of forward mode included."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return -tangents[0]


class Step(Negated):
    """A step, whose own tangent is that of a line."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)


class Doubled(TorchDispatchMode):
    """Doubles each sine, below autograd."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.ops.aten.sin.default else out


def doubled(r: Tensor) -> Tensor:
    with Doubled():
        return r.sin()


def by_jvp(mapped: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Any, ...]:
    return torch.func.jvp(mapped, (x,), (x.cos(),))


def by_duals(mapped: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Any, ...]:
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(mapped(forward_ad.make_dual(x, x.cos())))
        return value, tangent


FORWARD = {"torch.func.jvp": by_jvp, "duals": by_duals}
WITH_A_JVP: dict[str, Callable[[Tensor], Tensor]] = {
    "a view": lambda r: Negated.apply(r.sin()),
    "the sample": lambda r: Negated.apply(r) * r,
    "a step": lambda r: Step.apply(r.sin()),
    "a step under a nested map": lambda r: shardmap.vmap(lambda q: Step.apply(q.sin()))(r),
    "in an inner gradient": lambda r: torch.func.grad(lambda q: Negated.apply(q).exp().sum())(r),
    "a mode": doubled,
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", FORWARD)
@pytest.mark.parametrize("name", WITH_A_JVP)
def test_no_grad_stops_no_tangents(name: str, how: str, way: str, inside: bool) -> None:
    """The own derivative of a Function is not taken for that of its forward's operators."""

    def function(r: Tensor) -> Tensor:
        with torch.set_grad_enabled(not inside):
            return WITH_A_JVP[name](r)

    x = torch.randn(5, 3, dtype=DTYPE)
    mapped = shardmap.vmap(function, **WAYS[way])
    with torch.set_grad_enabled(inside):
        for _ in range(4):
            with pytest.raises(errors.AutogradFunctionError, match="forward-mode"):
                FORWARD[how](mapped, x)


SHARED = torch.tensor([1.0, -2.0, 0.5], dtype=DTYPE)
WITHOUT_TANGENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of what is detached": lambda r: Negated.apply(r.detach()) * r,
    "of what is shared": lambda r: Step.apply(SHARED) * r,
    "a derivative inside": lambda r: torch.func.grad(lambda q: Negated.apply(q).exp().sum())(
        r.detach()
    ) * r,
    "a nested map": lambda r: shardmap.vmap(lambda q: Step.apply(q))(r.detach()) * r,
    "of whole numbers": lambda r: Negated.apply(r.argmax()) * r,
    "a mode": lambda r: doubled(r.detach()) * r,
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", FORWARD)
@pytest.mark.parametrize("name", WITHOUT_TANGENTS)
def test_functions_that_no_tangent_reaches(name: str, how: str, way: str, grad: bool) -> None:
    function = WITHOUT_TANGENTS[name]
    mapped = shardmap.vmap(function, **WAYS[way])
    with torch.set_grad_enabled(grad):
        for number in range(4):
            x = torch.randn(5, 3, dtype=DTYPE)
            want = FORWARD[how](lambda b: torch.stack([function(r) for r in b.unbind(0)]), x)
            for got, right in zip(FORWARD[how](mapped, x), want, strict=True):
                assert_same(got, right, f"{name}, call {number}")
