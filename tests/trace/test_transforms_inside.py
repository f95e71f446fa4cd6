"""Transforms inside the function that are taken of shared tensors of transforms around the map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, jacrev, jvp, vjp

import shardmap

D = torch.float64


def _loss(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((x @ w).sin() - y).square().mean()


def _step(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _loss(w - 0.1 * grad(_loss)(w, x, y), x, y)


def _two_steps(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        w = w - 0.1 * grad(_loss)(w, x, y)
    return _loss(w, x, y)


def _second(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return grad(lambda v: grad(_loss)(v, x, y).square().sum())(w).sum()


def _forward(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return jvp(lambda v: _loss(v, x, y), (w,), (w.cos(),))[1]


def _rows(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(lambda v: grad(lambda u: (u * v * x[0, 0]).sin())(v))(w).sum() * y.sum()


INSIDE = [_step, _two_steps, _second, _forward, _rows]
AROUND: dict[str, Callable[..., Any]] = {
    "grad": lambda m, w: grad(m)(w),
    "grad of grad": lambda m, w: grad(lambda v: grad(m)(v).square().sum())(w),
    "jvp": lambda m, w: jvp(m, (w,), (w.sin(),))[1],
    "vjp": lambda m, w: vjp(m, w)[1](torch.ones((), dtype=D))[0],
    "jacrev": lambda m, w: jacrev(m)(w),
}
OPTIONS: list[dict[str, Any]] = [
    {}, {"chunk_size": 3}, {"devices": ["cpu", "cpu"]}, {"trace": "once"}, {"trace": "each"},
]  # fmt: skip


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("captured", [False, True])
def test_the_gradient_is_the_loops(
    inside: Callable[..., torch.Tensor], around: str, captured: bool
) -> None:
    random = torch.Generator().manual_seed(0)
    w = torch.randn(4, dtype=D, generator=random)
    xs = torch.randn(7, 5, 4, dtype=D, generator=random)
    ys = torch.randn(7, 5, dtype=D, generator=random)

    def loop(w: torch.Tensor) -> torch.Tensor:
        return torch.stack([inside(w, x, y) for x, y in zip(xs, ys, strict=True)]).mean()

    want = AROUND[around](loop, w)
    for options in OPTIONS:
        shared = shardmap.vmap(inside, in_dims=(None, 0, 0), **options)
        for call in range(4):

            def mapped(w: torch.Tensor, shared: Callable = shared, options: dict = options) -> Any:
                if captured:
                    return shardmap.vmap(lambda x, y: inside(w, x, y), **options)(xs, ys).mean()
                return shared(w, xs, ys).mean()

            got = AROUND[around](mapped, w)
            torch.testing.assert_close(got, want, msg=lambda m, o=options, c=call: f"{o} {c}: {m}")
