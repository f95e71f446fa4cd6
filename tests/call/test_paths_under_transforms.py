"""`torch.func` around and inside maps whose samples go different ways, against the loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from tests.call.paths import batch, expected
from tests.call.test_paths import branch, branch_in_a_branch, masked_values

Tensor = torch.Tensor
Map = Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]
pytestmark = pytest.mark.usefixtures("paths_pay_early")


def loop(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The plain loop in the place of a map."""
    return lambda x: expected(function, x)


def around(run: Map, function: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Any]]:
    """Transforms around a map."""
    func = torch.func
    summed = lambda t: run(function)(t).sin().sum()
    return {
        "grad": func.grad(summed),
        "grad of grad": func.grad(lambda t: func.grad(summed)(t).square().sum()),
        "vjp": lambda t: func.vjp(run(function), t)[1](t.cos())[0],
        "jvp": lambda t: func.jvp(run(function), (t,), (t.cos(),))[1],
        "jacrev": func.jacrev(lambda t: run(function)(t).sum(0)),
        "jacfwd": func.jacfwd(lambda t: run(function)(t).sum(0)),
        "hessian": func.hessian(summed),
    }


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("transform", list(around(loop, branch)))
@pytest.mark.parametrize("function", [branch, branch_in_a_branch, masked_values])
def test_transforms_around_a_map(function: Any, transform: str, chunk: int | None) -> None:
    x = batch(11)
    mapped = around(lambda f: shardmap.vmap(f, chunk_size=chunk), function)[transform]
    torch.testing.assert_close(mapped(x), around(loop, function)[transform](x))


INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": lambda r: torch.func.grad(lambda q: q**2 if q > 0 else -q)(r.sum()) * r,
    "grad of a number": lambda r: torch.func.grad(lambda q: q**2 if q.item() > 0 else q.sin())(
        r.sum()
    ),
    "grad of grad": lambda r: torch.func.grad(
        lambda q: torch.func.grad(lambda s: branch(s).sin().sum())(q).sum()
    )(r),
    "hessian": lambda r: torch.func.hessian(lambda q: branch(q).sum())(r),
    "jacrev": torch.func.jacrev(branch),
    "jacfwd": torch.func.jacfwd(branch_in_a_branch),
    "autograd": lambda r: torch.autograd.grad(branch(q := r.detach().requires_grad_()).sum(), q)[0],
}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"trace": "once"}], ids=str)
@pytest.mark.parametrize("name", INSIDE)
def test_transforms_inside_the_function(name: str, options: dict[str, Any]) -> None:
    function, mapped = INSIDE[name], shardmap.vmap(INSIDE[name], **options)
    for x in (batch(61), batch(59)):
        torch.testing.assert_close(mapped(x), expected(function, x))


def test_a_vmap_of_torch_maps_what_is_not_asked_about() -> None:
    x, w = batch(61), batch(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", shardmap.SlowLoopWarning)
        got = torch.func.vmap(lambda v: shardmap.vmap(lambda r: branch(r) * v)(x))(w)
    want = torch.stack([expected(lambda r, v=v: branch(r) * v, x) for v in w])
    torch.testing.assert_close(got, want)


def rows(*sizes: int) -> Tensor:
    """Batches of batches."""
    count = 1
    for size in sizes:
        count *= size
    return batch(count).reshape(*sizes, 3)


def of_outer(
    run: Map, function: Callable[[Tensor], Tensor], outer: Callable[..., Any]
) -> dict[str, Callable[[Tensor], Any]]:
    """Vmaps around a map, and transforms around and between both; `outer` maps over samples."""
    func, inner = torch.func, run(function)
    summed = lambda t: inner(t).sin().sum()
    return {
        "vmap": outer(inner),
        "grad of vmap": func.grad(lambda t: outer(inner)(t).sin().sum()),
        "vmap of grad": outer(func.grad(summed)),
        "vmap of grad of grad": outer(func.grad(lambda t: func.grad(summed)(t).square().sum())),
        "vmap of jacrev": outer(func.jacrev(lambda t: inner(t).sum(0))),
        "vmap of jacfwd": outer(func.jacfwd(lambda t: inner(t).sum(0))),
        "vmap of hessian": outer(func.hessian(summed)),
        "jacrev of vmap": func.jacrev(lambda t: outer(inner)(t).sum((0, 1))),
        "jacfwd of vmap": func.jacfwd(lambda t: outer(inner)(t).sum((0, 1))),
        "jvp of vmap": lambda t: func.jvp(outer(inner), (t,), (t.cos(),))[1],
        "hessian of vmap": func.hessian(lambda t: outer(inner)(t).sin().sum()),
    }


def looped(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The loop in the place of `torch.func.vmap`."""
    return lambda x: torch.stack([function(r) for r in x])


@pytest.mark.parametrize("name", list(of_outer(loop, branch, looped)))
@pytest.mark.parametrize("function", [branch, branch_in_a_branch, masked_values])
def test_vmaps_of_torch_around_a_map(function: Any, name: str) -> None:
    x = rows(5, 4)
    mapped = of_outer(shardmap.vmap, function, torch.func.vmap)[name]
    want = of_outer(loop, function, looped)[name](x)
    torch.testing.assert_close(mapped(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (3, 1), (2, 5), (7, 11)])
def test_vmaps_of_torch_around_small_batches(sizes: tuple[int, int]) -> None:
    x = rows(*sizes)
    want = looped(loop(branch))(x)
    torch.testing.assert_close(torch.func.vmap(shardmap.vmap(branch))(x), want)
    got = torch.func.vmap(shardmap.vmap(branch), in_dims=1, out_dims=2)(x.movedim(0, 1))
    torch.testing.assert_close(got, want.movedim(0, 2))
    torch.testing.assert_close(torch.vmap(shardmap.vmap(branch), chunk_size=2)(x), want)


def test_two_vmaps_of_torch_around_a_map() -> None:
    x = rows(2, 5, 4)
    want = looped(looped(loop(branch)))(x)
    got = torch.func.vmap(torch.func.vmap(shardmap.vmap(branch)))(x)
    torch.testing.assert_close(got, want)
    gradient = torch.func.vmap(
        torch.func.grad(lambda t: torch.func.vmap(shardmap.vmap(branch))(t).sin().sum())
    )
    summed = lambda t: looped(loop(branch))(t).sin().sum()
    torch.testing.assert_close(gradient(x), looped(torch.func.grad(summed))(x))


def test_captured_outer_samples_are_asked_about() -> None:
    x, w = batch(31), batch(7)

    def outer(run: Map, v: Tensor) -> Tensor:
        def inner(r: Tensor) -> Tensor:
            if v.sum() > 0:
                return r * v if r.sum() > 0 else r + v
            return branch_in_a_branch(r + v)

        return run(inner)(x)

    got = torch.func.vmap(lambda v: outer(shardmap.vmap, v))(w)
    want = torch.stack([outer(loop, v) for v in w])
    torch.testing.assert_close(got, want)
    got = torch.func.vmap(torch.func.grad(lambda v: outer(shardmap.vmap, v).sin().sum()))(w)
    want = torch.stack([torch.func.grad(lambda v: outer(loop, v).sin().sum())(v) for v in w])
    torch.testing.assert_close(got, want)


def test_two_arguments_of_which_a_vmap_maps_one() -> None:
    x, w = batch(31), rows(5, 31)
    function = lambda r, v: r * v if (r + v).sum() > 0 else v.cos()
    mapped = shardmap.vmap(function)
    got = torch.func.vmap(mapped, in_dims=(None, 0))(x, w)
    torch.testing.assert_close(got, torch.stack([expected(function, x, v) for v in w]))


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_a_map_that_reduces_under_a_vmap_of_torch(how: str) -> None:
    x = rows(5, 7)
    want = looped(loop(branch))(x)
    reduced = getattr(want, how)(1)
    torch.testing.assert_close(torch.func.vmap(shardmap.vmap(branch, reduce=how))(x), reduced)


def test_structures_and_out_dims_under_a_vmap_of_torch() -> None:
    function = lambda r: {"a": branch(r), "n": r.sum() if r[0] > 0 else 3}
    x = rows(5, 7)
    got = torch.func.vmap(shardmap.vmap(function, out_dims={"a": 1, "n": 0}))(x)
    torch.testing.assert_close(got["a"], looped(loop(branch))(x).movedim(1, 2))
    want = torch.stack([torch.stack([torch.as_tensor(function(r)["n"]) for r in q]) for q in x])
    torch.testing.assert_close(got["n"], want)


def test_gradients_from_outside_of_a_vmap_of_torch() -> None:
    found = []
    for run in (torch.func.vmap(shardmap.vmap(branch)), looped(loop(branch))):
        x = rows(5, 7).requires_grad_()
        first = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)[0]
        found.append((first, torch.autograd.grad(first.square().sum(), x)[0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_a_vmap_of_torch_between_two_maps() -> None:
    x = rows(11, 3, 2)
    got = shardmap.vmap(lambda r: torch.func.vmap(lambda q: shardmap.vmap(branch)(q))(r))(x)
    torch.testing.assert_close(got, looped(looped(loop(branch)))(x))


def test_draws_and_writes_under_a_vmap_of_torch_are_refused_and_the_remedy_works() -> None:
    x = rows(5, 7)
    draws = lambda r: r * torch.rand(()) if r.sum() > 0 else r
    with pytest.raises(errors.ShardmapError, match=r"use shardmap\.vmap around it"):
        torch.func.vmap(shardmap.vmap(draws, randomness="different"), randomness="different")(x)

    def writes(r: Tensor) -> Tensor:
        if r.sum() > 0:
            r.mul_(2)
        return r.sum()

    with pytest.raises(errors.ShardmapError, match=r"use shardmap\.vmap around it"):
        torch.func.vmap(shardmap.vmap(writes))(x.clone())
    got = shardmap.vmap(lambda q: shardmap.vmap(writes)(q))(x.clone())
    torch.testing.assert_close(got, looped(loop(writes))(x.clone()))
