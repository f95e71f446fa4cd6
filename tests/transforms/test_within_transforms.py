"""Derivatives of ours inside of those of `torch.func`, against loops of nested `torch.func`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import shardmap
from shardmap.errors import HistoryError, TransformError

Outer = Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[Tensor, Tensor], Any]]


def smooth(w: Tensor, r: Tensor) -> Tensor:
    return (w * r).sin() * r.sum()


def branching(w: Tensor, r: Tensor) -> Tensor:
    return (w * r).sin() * r.sum() if r[0] > 0 else (w * r).exp() * w.sum()


NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def with_net(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor, Tensor], Tensor]:
    return lambda p, w, r: functional_call(NET, p, (f(w, r),)).square().sum()


def loss(f: Callable[[Tensor, Tensor], Tensor], w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda out, r: (out.squeeze() - f(w, r).sum()).square()


def jacobians(f: Any, w: Tensor, x: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    ours = shardmap.jacrev(lambda r: f(w, r), **options)(x)
    return ours, torch.stack([jacrev(lambda r: f(w, r))(r) for r in x])


def by_columns(f: Any, w: Tensor, x: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    ours = shardmap.jacfwd(lambda r: f(w, r), **options)(x)
    return ours, torch.stack([jacrev(lambda r: f(w, r))(r) for r in x])


def by_cost(f: Any, w: Tensor, x: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    ours = shardmap.jacobian(f, argnums=(0, 1), in_dims=(None, 0), **options)(w, x)
    expected = [jacrev(f, argnums=(0, 1))(w, r) for r in x]
    return torch.cat(ours, -1), torch.stack([torch.cat(pair, -1) for pair in expected])


def with_aux(f: Any, w: Tensor, x: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    both = lambda r: (f(w, r), {"a": r.square() * w})
    found, aux = shardmap.jacrev(both, has_aux=True, **options)(x)
    expected = torch.stack([jacrev(lambda r: f(w, r))(r) for r in x])
    return found * aux["a"][:, None], expected * (x.square() * w)[:, None]


def hessians(f: Any, w: Tensor, x: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    ours = shardmap.hessian(lambda r: f(w, r), **options)(x)
    return ours, torch.stack([hessian(lambda r: f(w, r))(r) for r in x])


def pullbacks(f: Any, w: Tensor, x: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    value, product = shardmap.vjp(lambda r: f(w, r), **options)(x, x.cos())
    expected = [vjp(lambda r: f(w, r), r) for r in x]
    return value * product, torch.stack(
        [out * pull(r.cos())[0] for (out, pull), r in zip(expected, x, strict=True)]
    )


def hessian_products(f: Any, w: Tensor, x: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    one = lambda r: f(w, r).sum()
    value, product = shardmap.hvp(one, **options)(x, x.cos())
    return value[:, None] * product, torch.stack(
        [one(r) * vjp(grad(one), r)[1](r.cos())[0] for r in x]
    )


def gradients(f: Any, w: Tensor, x: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    one = lambda p, r: f(p * w, r).sum()
    ours = shardmap.per_sample_grad(one, **options)(w.sin(), x)
    return ours, torch.stack([grad(one)(w.sin(), r) for r in x])


def gradients_with_aux(f: Any, w: Tensor, x: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    one = lambda p, r: (f(p["p"] * w, r).sum(), r * w)
    found, aux = shardmap.per_sample_grad(one, has_aux=True, flat=True, **options)({"p": w}, x)
    expected = [grad(lambda p, r: one({"p": p}, r)[0])(w, r) for r in x]
    return found * aux, torch.stack(expected) * x * w


def gradients_of_a_module(f: Any, w: Tensor, x: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    ours = shardmap.per_sample_grad(NET, loss(f, w), flat=True, **options)(x, x.cos())
    parameters = dict(NET.named_parameters())

    def of_sample(p: Any, r: Tensor) -> Tensor:
        return loss(f, w)(functional_call(NET, p, (r,)), r.cos())

    rows = [grad(of_sample)(parameters, r) for r in x]
    return ours, torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows])


def norms(f: Any, w: Tensor, x: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    one = lambda p, r: f(p * w, r).sum()
    ours = shardmap.per_sample_grad(one, reduce="norm", **options)(w.sin(), x)
    return ours, torch.stack([grad(one)(w.sin(), r).norm() for r in x])


INSIDE = [
    jacobians, by_columns, by_cost, with_aux, hessians, pullbacks, hessian_products, gradients,
    gradients_with_aux, gradients_of_a_module, norms,
]  # fmt: skip


def tangents(g: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Any]:
    def tangent(w: Tensor, x: Tensor) -> Any:
        with forward_ad.dual_level():
            duals = forward_ad.make_dual(w, w.cos()), forward_ad.make_dual(x, x.cos())
            return forward_ad.unpack_dual(g(*duals)).tangent

    return tangent


OUTSIDE: dict[str, Outer] = {
    "by samples": lambda g: lambda w, x: grad(g, argnums=1)(w, x),
    "by weights": grad,
    "by both": lambda g: lambda w, x: grad(g, argnums=(0, 1))(w, x),
    "jacrev": jacrev,
    "twice": lambda g: grad(lambda w, x: grad(g)(w, x).sin().sum()),
    "vjp": lambda g: lambda w, x: vjp(g, w, x)[1](torch.tensor(0.7).double()),
    "jvp": lambda g: lambda w, x: jvp(g, (w, x), (w.cos(), x.cos()))[1],
    "forward mode": tangents,
    "grad under vmap": lambda g: (
        lambda w, x: vmap(grad(g), in_dims=(0, None))(torch.stack([w, w * 0.5]), x)
    ),
}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}], ids=["whole", "chunks"])
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("inside", INSIDE, ids=lambda inside: inside.__name__)
@pytest.mark.parametrize("f", [smooth, branching])
@pytest.mark.filterwarnings("ignore::shardmap.errors.SlowLoopWarning")
def test_derivatives_of_derivatives(f: Any, inside: Any, outside: str, options: Any) -> None:
    torch.manual_seed(0)
    w = torch.rand(3, dtype=torch.float64) + 0.3
    for size in (1, 7, 3, 7):
        x = torch.randn(size, 3, dtype=torch.float64)
        if outside in ("jvp", "forward mode") and inside in (by_columns, hessians):
            with pytest.raises(TransformError, match="torch has one level only.*shardmap.jacrev"):
                OUTSIDE[outside](lambda w, x: inside(f, w, x, options)[0].sum())(w, x)
            continue
        found, expected = [
            OUTSIDE[outside](lambda w, x, k=k: inside(f, w, x, options)[k].sin().sum())(w, x)
            for k in (0, 1)
        ]
        torch.testing.assert_close(found, expected)


UNIT = torch.eye(3, dtype=torch.float64)


def of_a_result(x: Tensor) -> Tensor:
    y = smooth(x, x)
    keep = {"retain_graph": True, "create_graph": True}
    return shardmap.vmap(lambda v: torch.autograd.grad(y, x, v, **keep)[0])(UNIT)


def of_a_result_with_zeros(x: Tensor) -> Tensor:
    y = smooth(x, x)
    keep = {"retain_graph": True, "create_graph": True, "materialize_grads": True}
    return shardmap.vmap(lambda v: torch.autograd.grad(y, x, v, allow_unused=True, **keep)[0])(UNIT)


def of_a_pullback(x: Tensor) -> Tensor:
    pull = vjp(lambda x: smooth(x, x), x)[1]
    return shardmap.vmap(lambda v: pull(v)[0])(UNIT)


def past_a_result(x: Tensor) -> Tensor:
    y = x.sin()
    keep = {"create_graph": True, "materialize_grads": True, "allow_unused": True}
    return shardmap.vmap(lambda v: torch.autograd.grad((y * v).sum(), x, **keep)[0])(UNIT)


def past_an_argument(x: Tensor) -> Tensor:
    keep = {"create_graph": True}
    return shardmap.vmap(lambda v: torch.autograd.grad((x * v).sin().sum(), x, **keep)[0])(
        UNIT + x.sin()
    )


@pytest.mark.parametrize(
    "inside",
    [of_a_result, of_a_result_with_zeros, of_a_pullback, past_a_result, past_an_argument],
    ids=lambda inside: inside.__name__,
)
@pytest.mark.parametrize("outside", [grad, jacrev])
def test_gradients_of_what_was_computed_outside_are_refused(inside: Any, outside: Any) -> None:
    x = torch.rand(3, dtype=torch.float64)
    with pytest.raises(HistoryError, match="computed"):
        outside(lambda x: inside(x).sin().sum())(x)


def test_the_remedies_of_that_refusal() -> None:
    x = torch.rand(3, dtype=torch.float64)

    def rows(x: Tensor) -> Tensor:
        pull = vjp(lambda x: smooth(x, x), x)[1]
        return torch.stack([pull(v)[0] for v in UNIT])

    def inside(x: Tensor) -> Tensor:
        return shardmap.vmap(lambda v: vjp(lambda x: smooth(x, x), x)[1](v)[0])(UNIT)

    def by_torch(x: Tensor) -> Tensor:
        return vmap(vjp(lambda x: smooth(x, x), x)[1])(UNIT)[0]

    def by_ours(x: Tensor) -> Tensor:
        return shardmap.jacrev(lambda x: smooth(x, x))(x[None])[0]

    expected = grad(lambda x: rows(x).sin().sum())(x)
    for remedy in (inside, by_torch, by_ours):
        found = grad(lambda x, remedy=remedy: remedy(x).sin().sum())(x)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("of", ["a result", "a sample", "a weight"])
def test_data_under_two_derivatives_is_refused_and_the_remedy_works(of: str) -> None:
    def f(w: Tensor, r: Tensor, bare: Callable[[Tensor], Tensor]) -> Tensor:
        cut = {"a result": r * w, "a sample": r, "a weight": w}[of]
        return bare(cut).sin() * w * r

    w, x = torch.rand(3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def mapped(bare: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda w: shardmap.vmap(lambda r: f(w, r, bare))(x).sin().sum()

    def loop(w: Tensor) -> Tensor:
        return torch.stack([f(w, r, Tensor.detach) for r in x]).sin().sum()

    with pytest.raises(TransformError, match=r"use \.detach\(\)"):
        hessian(mapped(lambda t: t.data))(w)
    torch.testing.assert_close(hessian(mapped(Tensor.detach))(w), hessian(loop)(w))
    one = grad(lambda w: torch.stack([f(w, r, lambda t: t.data) for r in x]).sin().sum())
    torch.testing.assert_close(grad(mapped(lambda t: t.data))(w), one(w))
