"""Products with Jacobians and Hessians equal a loop of `torch.func`'s and autograd's."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import shardmap
from shardmap import errors
from tests.transforms.functions import FUNCTIONS, NoForward, close, mlp

N = 3


def stacked(rows: list[Any]) -> Any:
    """The rows of a loop as one batch."""
    return pytree.tree_map(lambda *t: torch.stack(t), *rows)


def vectors_like(tree: Any) -> Any:
    """Random vectors in the structure of a batch."""
    return pytree.tree_map(torch.randn_like, tree)


def row(tree: Any, i: Any) -> Any:
    """One sample of a batch."""
    return pytree.tree_map(lambda t: t[i], tree)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vjp_and_jvp(name: str) -> None:
    function, x = FUNCTIONS[name], torch.randn(N, 6, dtype=torch.float64)
    results = stacked([function(r) for r in x])
    cotangents, tangents = vectors_like(results), torch.randn_like(x)
    backward: list[Any] = [torch.func.vjp(function, r) for r in x]
    expected = stacked(
        [(value, pull(row(cotangents, i))[0]) for i, (value, pull) in enumerate(backward)]
    )
    forward = stacked(
        [torch.func.jvp(function, (r,), (t,)) for r, t in zip(x, tangents, strict=True)]
    )
    several: list[dict[str, Any]] = [
        {},
        {"chunk_size": 2},
        {"devices": ["cpu", "cpu"]},
        {"trace": "once"},
    ]
    for options in several:
        close(shardmap.vjp(function, **options)(x, cotangents), expected)
        close(shardmap.jvp(function, **options)(x, tangents), forward)


@pytest.mark.parametrize("size", [0, 1, 3, 7])
def test_hvp(size: int) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return mlp(x).sin().sum() * x.prod()

    x, v = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    expected = stacked(
        [torch.autograd.functional.hvp(function, r, t) for r, t in zip(x, v, strict=True)]
    )
    close(shardmap.hvp(function, chunk_size=2)(x[:size], v[:size]), row(expected, slice(size)))
    shared = stacked([torch.autograd.functional.hvp(function, r, v[0]) for r in x])
    close(shardmap.hvp(function, in_dims=(0, None))(x, v[0]), shared)


def test_several_arguments_and_aux() -> None:
    x, y = torch.randn(N, 2, dtype=torch.float64), torch.randn(N, 4, dtype=torch.float64)
    u, w = torch.randn_like(x), torch.randn_like(y)

    def function(p: torch.Tensor, q: torch.Tensor) -> Any:
        return (q.sin().sum() * p**2).cumsum(0), {"sum": p.sum()}

    samples = list(zip(x, y, u, w, strict=True))
    pulled: list[Any] = [
        (*torch.func.vjp(function, p, q, has_aux=True), c) for p, q, c, _ in samples
    ]
    expected = stacked([(value, pull(c), aux) for value, pull, aux, c in pulled])
    close(shardmap.vjp(function, (0, 1), True)(x, y, u), expected)
    expected = stacked(
        [torch.func.jvp(function, (p, q), (a, b), has_aux=True) for p, q, a, b in samples]
    )
    close(shardmap.jvp(function, (0, 1), True)(x, y, (u, w)), expected)

    def scalar(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return function(p, q)[0].prod()

    expected = stacked(
        [torch.autograd.functional.hvp(scalar, (p, q), (a, b)) for p, q, a, b in samples]
    )
    close(shardmap.hvp(scalar, (0, 1))(x, y, (u, w)), expected)
    one = stacked(
        [torch.autograd.functional.hvp(lambda p, q=q: scalar(p, q), p, a) for p, q, a, _ in samples]
    )
    close(shardmap.hvp(scalar)(x, y, u), one)


def test_hvp_without_forward_formula(caplog: pytest.LogCaptureFixture) -> None:
    x, v = torch.randn(N, 4, dtype=torch.float64), torch.randn(N, 4, dtype=torch.float64)
    expected = stacked(
        [
            torch.autograd.functional.hvp(lambda p: p.sin().prod(), r, t)
            for r, t in zip(x, v, strict=True)
        ]
    )
    with caplog.at_level(logging.INFO, "shardmap"):
        close(shardmap.hvp(lambda p: NoForward.apply(p).prod())(x, v), expected)
    assert "two backward passes" in caplog.text


def test_gradients_flow_on() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, v = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    c = torch.randn(N, 1, dtype=torch.float64)
    cases: list[Any] = [
        (
            shardmap.vjp(net),
            c,
            [(net(r), torch.func.vjp(net, r)[1](t)[0]) for r, t in zip(x, c, strict=True)],
        ),
        (
            shardmap.jvp(net),
            v,
            [torch.func.jvp(net, (r,), (t,)) for r, t in zip(x, v, strict=True)],
        ),
        (
            shardmap.hvp(net),
            v,
            [
                torch.autograd.functional.hvp(net, r, t, create_graph=True)
                for r, t in zip(x, v, strict=True)
            ],
        ),
    ]
    for ours, vectors, expected in cases:
        found = ours(x, vectors)
        wanted = stacked(expected)
        close(found, wanted)
        grads = [
            torch.autograd.grad(pair[0].sum() + pair[1].sin().sum(), tuple(net.parameters()))
            for pair in (found, wanted)
        ]
        close(grads[0], grads[1])
        with torch.no_grad():
            assert not any(t.requires_grad for t in ours(x, vectors))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(N, 4)
    makers: list[Any] = [
        (shardmap.vjp, "cotangents"),
        (shardmap.jvp, "tangents"),
        (shardmap.hvp, "vectors"),
    ]
    for make, what in makers:
        name = make.__name__
        function = torch.sum if name == "hvp" else torch.sin
        with pytest.raises(
            errors.TransformError, match=rf"shardmap.{name}\(.*the {what} as the last one"
        ):
            make(function)(x)
        with pytest.raises(
            errors.TransformError, match=f"the {what} of one sample hold torch.float32 .3,."
        ):
            make(function)(x, torch.randn(N, 3))
        with pytest.raises(
            errors.TransformError, match=f"the {what} of one sample hold torch.float64"
        ):
            make(function)(x, x.double())
        with pytest.raises(errors.TransformError, match=f"the {what} have the structure"):
            make(function)(x, (x, x))
        with pytest.raises(errors.TransformError, match="argnums=3 is out of range"):
            make(function, 3)(x, x)
        with torch.inference_mode(), pytest.raises(errors.TransformError, match="inference_mode"):
            make(function)(torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(errors.TransformError, match=r"result has the shape \(4,\)"):
        shardmap.hvp(torch.sin)(x, x)


def test_plans() -> None:
    x = torch.randn(7, 6)
    plan = shardmap.jvp(mlp, chunk_size=3).plan(x, x)
    assert plan.lanes[0].chunks == 3
    assert "jvp(mlp)" in str(plan)
    close(plan.run(), shardmap.jvp(mlp)(x, x), 1e-5)
