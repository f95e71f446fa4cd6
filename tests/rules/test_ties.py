"""Derivatives of whole reductions at ties and at singular points are the loop's."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import shardmap
from tests.loop import loop

NAN, INF = float("nan"), float("inf")
ROWS = torch.tensor(
    [
        [0.0, 1, 1, 1, 2],
        [3, 1, 2, 2, 2],
        [5, 5, 5, 5, 5],
        [0, -0.0, 0, 2, -2],
        [INF, 1, INF, 0, 2],
        [-INF, 1, -INF, 2, 2],
        [NAN, 1, NAN, 0, 2],
        [NAN] * 5,
        [-INF] * 5,
        [0.5, -1, 3, 2, 7],
    ],
    dtype=torch.float64,
)
ROWS_OF_NUMBERS = ROWS[[0, 1, 2, 3, 9]]
TANGENTS = torch.arange(1.0, 6, dtype=torch.float64).expand(ROWS.shape).contiguous()

Function = Callable[[Tensor], Tensor]


def square(x: Tensor) -> Tensor:
    return x[:4].reshape(2, 2)


WHOLE: dict[str, Function] = {
    **{
        f"{name} of {kind}": lambda x, name=name, part=part: getattr(part(x), name)()
        for name in ("max", "min", "median", "nanmedian", "amax", "amin")
        for kind, part in {
            "a vector": lambda x: x,
            "a matrix": square,
            "a number": lambda x: x[0],
            "a transposed matrix": lambda x: square(x).t(),
        }.items()
    },
    "aminmax": lambda x: sum(x.aminmax()),  # pyright: ignore[reportReturnType]
    "an infinite cotangent": lambda x: x.max().log() + (x.min() - 1).sqrt(),
    "renorm": lambda x: torch.renorm(x.reshape(5, 1), 2, 0, 1.0),
    "renorm of columns": lambda x: torch.renorm(x.reshape(5, 1), 3, 1, 1.0),
}


def outside(mapped: Callable[[Function], Function], func: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = mapped(func)(x)
    weights = torch.arange(1.0, y.numel() + 1, dtype=y.dtype).view(y.shape)
    return torch.autograd.grad((y * weights).sum(), x)[0]


def second(mapped: Callable[[Function], Function], func: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(mapped(lambda r: func(r) ** 2)(x).sum(), x, create_graph=True)
    return torch.autograd.grad(g[:, ::2].sum() + (g**2).sum(), x)[0]


def forward(mapped: Callable[[Function], Function], func: Function, x: Tensor) -> Tensor:
    return torch.func.jvp(mapped(func), (x,), (TANGENTS[: len(x)],))[1]


def of_torch(mapped: Callable[[Function], Function], func: Function, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: mapped(func)(x).sum())(x)


def backward_inside(mapped: Callable[[Function], Function], func: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    gradient = torch.func.grad(lambda r: (func(r) ** 2).sum())
    return torch.autograd.grad(mapped(gradient)(x).sum(), x)[0]


DERIVATIVES = {f.__name__: f for f in (outside, second, forward, of_torch, backward_inside)}


@pytest.fixture(autouse=True)
def quiet() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives(name: str, derivative: str) -> None:
    """Every sample's, in one batch with ties, infinities and NaN in others."""
    taken, func = DERIVATIVES[derivative], WHOLE[name]
    expected = taken(loop, func, ROWS)
    for size in (None, 3):
        found = taken(lambda f, size=size: shardmap.vmap(f, chunk_size=size), func, ROWS)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["median", "nanmedian", "max", "min"])
def test_maps_and_jacobians_around(name: str) -> None:
    """A map inside a map, and the transforms of both libraries around a map."""

    def func(x: Tensor) -> Tensor:
        return getattr(x, name)()

    x = torch.stack([ROWS_OF_NUMBERS, ROWS_OF_NUMBERS.flip(0)])
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loop(loop(func))(a).sum(), a)
    (found,) = torch.autograd.grad(shardmap.vmap(shardmap.vmap(func))(b).sum(), b)
    torch.testing.assert_close(found, expected)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(
            transform(shardmap.vmap(func))(ROWS_OF_NUMBERS),
            transform(loop(func))(ROWS_OF_NUMBERS),
        )
    expected = torch.stack([torch.func.jacrev(loop(func))(rows) for rows in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(shardmap.vmap(func)))(x), expected)
    torch.testing.assert_close(shardmap.jacrev(shardmap.vmap(func))(x), expected)
    torch.testing.assert_close(shardmap.jacfwd(shardmap.vmap(func))(x), expected)
    a, b = x[0].clone().requires_grad_(), x[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loop(func)(a).sum(), a)
    (found,) = torch.autograd.grad(shardmap.vmap(func, remat=True, chunk_size=2)(b).sum(), b)
    torch.testing.assert_close(found, expected)
