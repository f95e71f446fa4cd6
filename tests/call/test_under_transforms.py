"""`trace="auto"` under `torch.func` transforms: replayed as elsewhere, and told apart by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp

import shardmap
from tests.call.all_changes import WAYS
from tests.call.runs import counting

Map = Callable[..., Tensor]


def loop(f: Callable[..., Tensor]) -> Map:
    return lambda *rows: torch.stack([f(*r) for r in zip(*rows, strict=True)])


def mapped(f: Callable[..., Tensor]) -> Map:
    return shardmap.vmap(f, randomness="different")


NET = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
WEIGHTS = {name: p.detach().clone() for name, p in NET.named_parameters()}
SCALE = torch.tensor(1.5, dtype=torch.float64)


def net(weights: Any, r: Tensor) -> Tensor:
    out = functional_call(NET, weights, (r,))
    assert isinstance(out, Tensor)
    return out


def of_weights(take: Callable[..., Map], x: Tensor) -> Any:
    return grad(lambda w: take(lambda r: net(w, r).square())(x).mean())(WEIGHTS)


def of_rows(take: Callable[..., Map], x: Tensor) -> Any:
    return grad(lambda q: take(lambda r: (r * SCALE).sin() * r.sum())(q).sum())(x)


def of_both(take: Callable[..., Map], x: Tensor) -> Any:
    def loss(w: Tensor, q: Tensor) -> Tensor:
        return take(lambda a, b: (a * w).cos() * b)(q, q.square()).sum()

    return grad_and_value(loss, argnums=(0, 1))(torch.tensor([0.2, 1.1, -0.4]).double(), x)


def inside_and_outside(take: Callable[..., Map], x: Tensor) -> Any:
    def loss(w: Any) -> Tensor:
        def residual(r: Tensor) -> Tensor:
            return hessian(lambda q: net(w, q).sum())(r).diagonal().sum()

        return take(residual)(x).square().mean()

    return grad(loss)(WEIGHTS)


def jacobians_inside(take: Callable[..., Map], x: Tensor) -> Any:
    def loss(s: Tensor) -> Tensor:
        return take(lambda r: jacrev(lambda t, q: (q * t).sin() * t)(s, r))(x).square().sum()

    return grad(loss)(SCALE)


def two_derivatives_inside(take: Callable[..., Map], x: Tensor) -> Any:
    def loss(s: Tensor) -> Tensor:
        def pulled(r: Tensor) -> Tensor:
            inner = jacrev(grad(lambda t, q: (q * t).sin().sum() * t), argnums=(0, 1))
            return torch.stack([t.sum() for t in inner(s, r)])

        return take(pulled)(x).sin().sum()

    return jacrev(loss)(SCALE)


def by_forward_mode(take: Callable[..., Map], x: Tensor) -> Any:
    return jvp(lambda q: take(lambda r: (r * SCALE).tanh())(q), (x,), (x.cos(),))


def by_jacrev(take: Callable[..., Map], x: Tensor) -> Any:
    return jacrev(lambda s: take(lambda r: (r * s).tanh())(x))(SCALE)


def by_jacfwd(take: Callable[..., Map], x: Tensor) -> Any:
    return jacfwd(lambda s: take(lambda r: (r * s).tanh())(x))(SCALE)


def by_vjp(take: Callable[..., Map], x: Tensor) -> Any:
    out, pull = vjp(lambda s, q: take(lambda r: (r * s).tanh())(q), SCALE, x)
    return out, pull(out.cos())


def twice(take: Callable[..., Map], x: Tensor) -> Any:
    def outer(s: Tensor) -> Tensor:
        return grad(lambda t: take(lambda r: (r * s * t).sin())(x).sum())(s * 0.5)

    return grad(outer)(SCALE)


def captured_at_two_levels(take: Callable[..., Map], x: Tensor) -> Any:
    def outer(s: Tensor) -> Tensor:
        return grad(lambda t: (take(lambda r: r * s + t.square())(x) * t).sum())(s * 0.5)

    return grad(outer)(SCALE)


def by_hessian(take: Callable[..., Map], x: Tensor) -> Any:
    return hessian(lambda s: take(lambda r: (r * s).sin())(x).sum())(torch.ones(3).double() * SCALE)


def stopped(take: Callable[..., Map], x: Tensor) -> Any:
    return grad(lambda s: take(lambda r: r * s.detach() + s)(x).sum())(SCALE)


def asked(take: Callable[..., Map], x: Tensor) -> Any:
    def f(s: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda r: (r * s).sin() if s.requires_grad else r * 3 * s

    return grad(lambda s: take(f(s))(x).sum())(SCALE), take(f(SCALE))(x), take(f(SCALE * 2))(x)


def a_branch(take: Callable[..., Map], x: Tensor) -> Any:
    return grad(lambda s: take(lambda r: r * s if r.sum() > 0 else s.square() - r)(x).sum())(SCALE)


def with_a_shared_argument(take: Callable[..., Map], x: Tensor) -> Any:
    def loss(s: Tensor) -> Tensor:
        if take is mapped:
            return shardmap.vmap(lambda r, t: (r * t).sin(), in_dims=(0, None))(x, s).sum()
        return torch.stack([(r * s).sin() for r in x]).sum()

    return grad(loss)(SCALE)


FORMS = [
    of_weights, of_rows, of_both, inside_and_outside, jacobians_inside, two_derivatives_inside,
    by_forward_mode, by_jacrev, by_jacfwd,
    by_vjp, twice, captured_at_two_levels, by_hessian, stopped, asked, a_branch,
    with_a_shared_argument,
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_calls_in_a_row_equal_the_loop(form: Callable[..., Any], size: int) -> None:
    torch.manual_seed(0)
    for _ in range(7):
        x = torch.randn(size, 3, dtype=torch.float64)
        torch.testing.assert_close(form(mapped, x), form(loop, x))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_weights_that_change_are_followed(form: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    before = {name: w.clone() for name, w in WEIGHTS.items()}
    x = torch.randn(5, 3, dtype=torch.float64)
    try:
        for k in range(7):
            SCALE.add_(0.25)  # in place: what functions capture is the same tensor
            WEIGHTS.update({name: w + 0.1 * k for name, w in WEIGHTS.items()})
            torch.testing.assert_close(form(mapped, x), form(loop, x))
    finally:
        SCALE.fill_(1.5)
        WEIGHTS.update(before)


def test_what_is_recorded_under_one_transform_serves_no_other() -> None:
    """One map, called plainly, with gradients from outside, and at several levels in turn."""
    seen = []

    def f(r: Tensor) -> Tensor:
        return (r * SCALE).sin() * r

    take = shardmap.vmap(f)
    x = torch.randn(5, 3, dtype=torch.float64)
    ways: list[Callable[[Map], Any]] = [
        lambda m: m(x),
        lambda m: grad(lambda q: m(q).sum())(x),
        lambda m: grad(lambda q: grad(lambda p: m(p).sum())(q).square().sum())(x),
        lambda m: grad(lambda q: grad(lambda p: (m(q) * p).sum())(q).square().sum())(x),
        lambda m: jvp(m, (x,), (x.cos(),)),
        lambda m: jvp(lambda q: grad(lambda p: m(p).sum())(q), (x,), (x.cos(),)),
        lambda m: grad(lambda q: jvp(m, (q,), (x.cos(),))[1].square().sum())(x),
        lambda m: torch.func.vmap(m)(torch.stack([x, x + 1])),
        lambda m: torch.func.vmap(grad(lambda q: m(q).sum()))(torch.stack([x, x + 1])),
        lambda m: grad(lambda q: torch.func.vmap(m)(q).sum())(torch.stack([x, x + 1])),
    ]
    for _ in range(5):
        for way in ways:
            torch.testing.assert_close(way(take), way(loop(f)))
            seen.append(way)
    assert len(seen) == 50


def test_the_function_is_not_run_again() -> None:
    runs = []

    def residual(w: Tensor, r: Tensor) -> Tensor:
        return (r @ w).tanh().sum()

    w, x = torch.randn(3, 4), torch.randn(7, 3)
    for _ in range(12):
        with counting(residual) as calls:
            grad(lambda w: shardmap.vmap(lambda r: residual(w, r))(x).mean())(w)
        runs.append(calls())
    assert runs == [2, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]


ROTATING = pytest.mark.rotating
TORCH_REFUSES = frozenset(
    "backward_hook_on_a_module hook_on_a_parameter requires_grad_of_a_parameter "
    "a_custom_function".split()
)
"""Ways whose loop raises in a transform, before or after the change."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=ROTATING) for n in WAYS if n not in TORCH_REFUSES]
)
def test_a_change_between_calls(name: str) -> None:
    torch.manual_seed(0)
    way = WAYS[name]()

    def values_and_gradients(take: Map, rows: Tensor) -> Any:
        def loss(q: Tensor) -> tuple[Tensor, Tensor]:
            found = take(q)
            return found.square().sum(), found

        return grad(loss, has_aux=True)(rows)

    def compare(f: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        expected = values_and_gradients(loop(f), rows)
        torch.testing.assert_close(values_and_gradients(mapped(f), rows), expected)

    try:
        f = next(way)
        for _ in range(3):
            compare(f, torch.rand(3, 3) + 0.5)
        f = next(way)
        for _ in range(4):
            compare(f, torch.rand(3, 3) + 0.5)
    finally:
        for _ in way:  # what was patched is put back
            pass
