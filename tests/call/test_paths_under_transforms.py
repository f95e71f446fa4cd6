"""`torch.func` around and inside maps whose samples go different ways, against the loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
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
