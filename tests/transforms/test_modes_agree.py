"""`shardmap.jacobian` is `torch.func.jacrev` of each sample, whichever mode it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from tests.same import assert_same

Tensor = torch.Tensor
Function = Callable[[Tensor], Tensor]

torch.manual_seed(0)
WIDE = torch.randn(3, 50, dtype=torch.float64)
"""More outputs than inputs: forward mode costs less."""


class OwnRules(torch.autograd.Function):
    """A Function whose backward and jvp are not those of its forward, nor of each other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0] * 5


def hooked(r: Tensor) -> Tensor:
    h = r.sin()
    if h.requires_grad:
        h.register_hook(lambda g: g * 3)
    return h @ WIDE


def hooked_always(r: Tensor) -> Tensor:
    h = r.sin()
    h.register_hook(lambda g: g * 3)
    return h @ WIDE


def asked(r: Tensor) -> Tensor:
    h = r.sin()
    return (h * 5 if h.requires_grad else h) @ WIDE


def asked_by_its_node(r: Tensor) -> Tensor:
    h = r.sin()
    return (h if h.grad_fn is None else h * 5) @ WIDE


def asked_by_a_leaf(r: Tensor) -> Tensor:
    h = r.sin()
    return (h if h.is_leaf else h * 5) @ WIDE


def asked_on_a_path(r: Tensor) -> Tensor:
    h = r.sin()
    if r[0] > 0 and h.requires_grad:
        h = h * 5
    return h @ WIDE


def hooked_on_a_path(r: Tensor) -> Tensor:
    h = r.sin()
    if r[0] > 0 and h.requires_grad:
        h.register_hook(lambda g: g * 3)
    return h @ WIDE


def without_grad(r: Tensor) -> Tensor:
    with torch.no_grad():
        h = r.sin()
    return (h * r) @ WIDE


FUNCTIONS = (
    hooked, hooked_always, asked, asked_by_its_node, asked_by_a_leaf, asked_on_a_path,
    hooked_on_a_path, without_grad, lambda r: OwnRules.apply(r) @ WIDE,
)  # fmt: skip


def batch() -> Tensor:
    """Samples of which the first is negative: it takes the path that asks nothing."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 0] = torch.tensor([-1.0, 2.0, -0.5, 0.5, 1.0])
    return x


def looped(function: Function, x: Tensor) -> Tensor:
    return torch.stack([torch.func.jacrev(function)(r) for r in x])  # pyright: ignore


@pytest.mark.parametrize("trace", ["auto", "each", "once"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_what_differs_by_mode_is_that_of_reverse_mode(function: Function, trace: str) -> None:
    jacobians = shardmap.jacobian(function, trace=trace)
    for x in (batch(), batch().flip(0)):
        expected = looped(function, x)
        for _ in range(2):
            assert_same(jacobians(x), expected, function.__name__)
        assert_same(shardmap.jacobian(function, trace=trace)(x), expected, function.__name__)


def test_a_module_with_a_backward_hook() -> None:
    module = torch.nn.Tanh()
    module.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))
    x = batch()
    expected = 3 * looped(lambda r: r.tanh() @ WIDE, x)
    assert_same(shardmap.jacobian(lambda r: module(r) @ WIDE)(x), expected, "the hook's")


@pytest.mark.parametrize("inner", [torch.float32, torch.float64])
@pytest.mark.parametrize("outer", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 50])
def test_the_dtype_is_that_of_the_input(inner: torch.dtype, outer: torch.dtype, width: int) -> None:
    weights = WIDE[:, :width].to(outer)

    def function(r: Tensor, empty: Tensor) -> Tensor:
        return r.to(outer).sin() @ weights + empty.sum().to(outer)

    x, empty = batch().to(inner), torch.zeros(5, 0, dtype=torch.float16)
    jacobians = shardmap.jacobian(function, argnums=(0, 1))
    found = jacobians(x, empty)
    assert jacobians.method == ("forward" if width == 50 else "reverse")
    expected = looped(lambda r: function(r, empty[0]), x)
    assert found[0].dtype == expected.dtype == inner
    assert_same(found[0], expected, "the Jacobian", precision=torch.float32)
    assert found[1].dtype == torch.float16
    assert found[1].shape == (5, width, 0)


def test_forward_mode_is_still_taken_where_the_modes_agree() -> None:
    def masked(r: Tensor) -> Tensor:
        with torch.no_grad():
            mask = torch.ones(3, dtype=r.dtype).cumsum(0)
        return (r * mask).relu() @ WIDE

    jacobians = shardmap.jacobian(masked)
    assert_same(jacobians(batch()), looped(masked, batch()), "the Jacobian")
    assert jacobians.method == "forward"
