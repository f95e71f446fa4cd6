"""Functions that ask whether a tensor requires grad, under transforms and forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch.autograd import forward_ad

import shardmap
from shardmap import errors
from tests.same import assert_same

Tensor = torch.Tensor
Batched = Callable[[Tensor, Tensor, Tensor], Tensor]

DTYPE = torch.float64
torch.manual_seed(0)
X, Y, U = (
    torch.randn(3, 4, dtype=DTYPE),
    torch.randn(3, 4, dtype=DTYPE),
    torch.randn(4, dtype=DTYPE),
)
W = torch.randn(4, dtype=DTYPE, requires_grad=True)
RECORDED = torch.randn(3, 4, dtype=DTYPE, requires_grad=True)


def asked(r: Tensor, s: Tensor, u: Tensor) -> Tensor:
    """A product whose factor tells which tensors require grad."""
    tensors = (
        r, r * 2, s, s * W, W * 2, r * W, r.detach() * W, r.clone()[0], r.unbind()[0], u * 3,
        u * 3 * r, u * 3 * s,
    )  # fmt: skip
    factor = 1.0
    for number, t in enumerate(tensors):
        factor += 2.0**number * t.requires_grad
        factor += 2.0**-number * (t.is_leaf + 0.3 * (t.grad_fn is None))
    return r.sin() * s * W * u * factor


def by_inner_gradient(r: Tensor, s: Tensor, u: Tensor) -> Tensor:
    leaf = r.clone().requires_grad_()
    scale = 2.0 if leaf.requires_grad and (leaf * s).requires_grad else 1.0
    with torch.enable_grad():
        (g,) = torch.autograd.grad((leaf * u).sin().sum(), leaf, create_graph=True)
    return g * s * scale


def dual(*names: str) -> Callable[[Batched], Tensor]:
    def take(f: Batched) -> Tensor:
        given = {"x": X, "y": Y, "u": U}
        with forward_ad.dual_level():
            for name in names:
                given[name] = forward_ad.make_dual(given[name], given[name].cos())
            tangent = forward_ad.unpack_dual(f(*given.values())).tangent
        assert tangent is not None
        return tangent

    return take


def jvp(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return torch.func.jvp(f, (at,), (at.cos(),))[1]


def grad(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return cast(Callable[[Tensor], Tensor], torch.func.grad(f))


vmap = torch.func.vmap

AROUND: dict[str, Callable[[Batched], Tensor]] = {
    "jvp of the mapped": lambda f: jvp(lambda x: f(x, Y, U), X),
    "jvp of the shared": lambda f: jvp(lambda u: f(X, Y, u), U),
    "jvp of what requires grad": lambda f: jvp(lambda x: f(x, Y, U), RECORDED),
    "dual mapped": dual("x"),
    "dual shared": dual("u"),
    "dual all": dual("x", "y", "u"),
    "dual beside what requires grad": lambda f: dual("y")(lambda x, y, u: f(RECORDED, y, u)),
    "vmap in dual": lambda f: dual("x")(lambda x, y, u: vmap(lambda u: f(x, y, u))(u[None])[0]),
    "grad": lambda f: grad(lambda x: f(x, Y, U).sum())(X),
    "grad of the other": lambda f: grad(lambda y: f(X, y, U).sum())(Y),
    "grad of the shared": lambda f: grad(lambda u: f(X, Y, u).sum())(U),
    "vmap": lambda f: vmap(lambda x: f(x, Y, U))(X[None]),
    "vmap of the shared": lambda f: vmap(lambda u: f(X, Y, u))(U[None]),
    "vmap beside what requires grad": lambda f: vmap(lambda y: f(RECORDED, y, U))(Y[None]),
    "grad of vmap": lambda f: grad(lambda x: vmap(lambda y: f(x, y, U))(Y[None]).sum())(X),
    "grad of vmap, shared": lambda f: grad(lambda u: vmap(lambda y: f(X, y, u))(Y[None]).sum())(U),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x, Y, U).sum()))(X[None]),
    "vmap of jvp": lambda f: vmap(lambda x: jvp(lambda x: f(x, Y, U), x))(X[None]),
    "grad of jvp": lambda f: grad(lambda x: jvp(lambda y: f(x, y, U), Y).sum())(X),
    "jvp of grad": lambda f: jvp(grad(lambda x: f(x, Y, U).sum()), X),
    "jvp of another's grad": lambda f: jvp(lambda y: grad(lambda x: f(x, y, U).sum())(X), Y),
}  # fmt: skip


def loop(function: Callable[..., Tensor]) -> Batched:
    return lambda x, y, u: torch.stack([function(x[i], y[i], u) for i in range(len(x))])


@pytest.mark.parametrize("trace", ["auto", "each", "once"])
@pytest.mark.parametrize("around", AROUND)
def test_the_answer_is_that_of_the_loop(around: str, trace: str) -> None:
    mapped = shardmap.vmap(asked, in_dims=(0, 0, None), trace=trace)
    for _ in range(2):
        assert_same(AROUND[around](mapped), AROUND[around](loop(asked)), around)


@pytest.mark.parametrize("around", ["dual mapped", "dual shared", "dual all"])
def test_a_leaf_made_inside_requires_grad(around: str) -> None:
    mapped = shardmap.vmap(by_inner_gradient, in_dims=(0, 0, None))
    assert_same(AROUND[around](mapped), AROUND[around](loop(by_inner_gradient)), around)


@pytest.mark.parametrize("around", ["jvp of the mapped", "dual mapped", "dual all", "grad"])
def test_a_map_inside_a_map(around: str) -> None:
    def of_maps(f: Batched) -> Batched:
        return lambda x, y, u: shardmap.vmap(lambda x: f(x, y, u))(x[None])[0]

    inside = shardmap.vmap(asked, in_dims=(0, 0, None))
    expected = AROUND[around](loop(asked))
    for f in (inside, loop(asked)):
        assert_same(AROUND[around](of_maps(f)), expected, around)


def test_a_plain_call_and_one_under_forward_mode_take_the_same_branch() -> None:
    def function(r: Tensor) -> Tensor:
        h = r.sin()
        return h * 10 if h.requires_grad else h

    mapped = shardmap.vmap(function, trace="once")
    for x in (X, RECORDED, X):
        expected = torch.stack([function(x[i]) for i in range(len(x))])
        assert_same(mapped(x), expected, "the values")
        assert_same(jvp(mapped, x), X.cos() * X.cos() if x is X else x.cos() ** 2, "the tangent")


def switched_off(r: Tensor) -> Tensor:
    with forward_ad._set_fwd_grad_enabled(False):
        h = r.sin()
    return h * r


def by_inner_tangents(r: Tensor) -> Tensor:
    """Forward mode inside, in part of which it is switched off."""
    with forward_ad.dual_level():
        twin = forward_ad.make_dual(r, r.cos())
        tangent = forward_ad.unpack_dual(switched_off(twin)).tangent
    assert tangent is not None
    return tangent


FORWARD = {
    "jvp": lambda f: jvp(f, X),
    "dual": lambda f: dual("x")(lambda x, y, u: f(x)),
}


@pytest.mark.parametrize("trace", ["auto", "once"])
@pytest.mark.parametrize("around", FORWARD)
def test_forward_mode_switched_off_inside_is_refused(around: str, trace: str) -> None:
    mapped = shardmap.vmap(switched_off, trace=trace)
    expected = torch.stack([switched_off(r) for r in X])
    for _ in range(3):
        assert_same(mapped(X), expected, "without forward mode around")
        with pytest.raises(errors.TransformError, match="switches forward mode off"):
            FORWARD[around](mapped)
    remedy = shardmap.vmap(lambda r: r.sin().detach() * r)
    by_loop = FORWARD[around](lambda x: torch.stack([switched_off(r) for r in x]))
    assert_same(FORWARD[around](remedy), by_loop, "the remedy")


def test_forward_mode_switched_off_where_no_tangent_comes_from_outside() -> None:
    def loop_of(x: Tensor) -> Tensor:
        return torch.stack([by_inner_tangents(x[i]) for i in range(len(x))])

    mapped = shardmap.vmap(by_inner_tangents)
    assert_same(mapped(X), loop_of(X), "the tangents")
    by_map, by_loop = [grad(lambda x, f=f: f(x).sin().sum())(X) for f in (mapped, loop_of)]
    assert_same(by_map, by_loop, "their gradient")


@pytest.mark.parametrize("around", FORWARD)
def test_forward_mode_switched_off_around_the_call(around: str) -> None:
    mapped = shardmap.vmap(lambda r: r.sin())

    def half(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            with forward_ad._set_fwd_grad_enabled(False):
                stopped = f(x)
            return stopped * x

        return function

    found, expected = FORWARD[around](half(mapped)), FORWARD[around](half(torch.sin))
    assert_same(found, expected, "the tangent")
