"""The same seed gives the same draws, whatever stands around a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap

Tensor = torch.Tensor

F64 = torch.float64
P = torch.full((3,), 0.5, dtype=F64)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "randn": lambda r: r.exp() * torch.randn(3, dtype=F64) * torch.rand_like(r),
    "dropout": lambda r: torch.nn.functional.dropout(r.sin(), 0.5) + torch.rand(3, dtype=F64),
    "bernoulli": lambda r: r * torch.bernoulli(P) * torch.normal(P, r.detach().abs()),
    "bernoulli of the sample": lambda r: r * torch.bernoulli(r.sigmoid()),
    "normal of the sample": lambda r: r * torch.normal(r, (r * 2).abs()),
    "in place": lambda r: r * torch.empty(3, dtype=F64).normal_().exponential_(),
    "multinomial": lambda r: r[torch.multinomial(torch.ones(3), 2)],
    "permutation": lambda r: r[torch.randperm(3)],
}

AROUND: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "requires grad": lambda f, x: f(x.clone().requires_grad_()).detach(),
    "grad": lambda f, x: torch.func.grad(lambda q: (lambda y: (y.sum(), y))(f(q)), has_aux=True)(x)[
        1
    ],
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[0],
    "vmap that shares draws": lambda f, x: torch.func.vmap(f, randomness="same")(
        torch.stack([x, x])
    )[1],
}

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"chunk_size": 2},
    "two_lanes": {"devices": ["cpu", "cpu"], "chunk_size": 3},
    "once": {"trace": "once"},
}


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_draws_under_gradients_and_transforms(name: str, randomness: str) -> None:
    x = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    for way, options in WAYS.items():
        mapped = shardmap.vmap(FUNCTIONS[name], randomness=randomness, **options)
        torch.manual_seed(1)
        want, following = mapped(x), torch.rand(2)
        for around, call in AROUND.items():
            torch.manual_seed(1)
            torch.testing.assert_close(call(mapped, x), want, msg=f"{way}, {around}")
            assert torch.equal(torch.rand(2), following)


def test_a_draw_has_gradients_of_zero_to_its_parameters() -> None:
    x = torch.randn(5, 3, dtype=F64, requires_grad=True)
    scale = torch.ones(3, dtype=F64, requires_grad=True)
    for function in (
        lambda r: torch.bernoulli((r * scale).sigmoid()),
        lambda r: torch.normal(r, scale),
        lambda r: torch.normal(r * scale, 2.0),
        lambda r: torch.normal(1.0, (r * scale).abs()),
    ):
        for options in WAYS.values():
            out = shardmap.vmap(function, randomness="different", **options)(x)
            loop = torch.stack([function(r) for r in x])
            assert out.requires_grad == loop.requires_grad
            for of in (x, scale):
                (got,) = torch.autograd.grad(out.sum(), of, retain_graph=True, allow_unused=True)
                (want,) = torch.autograd.grad(loop.sum(), of, retain_graph=True, allow_unused=True)
                assert (got is None) == (want is None)
                assert got is None or torch.equal(got, want)
