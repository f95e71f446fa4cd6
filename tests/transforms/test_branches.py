"""Derivatives of functions that ask for values: every sample against the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import functional

import shardmap
from tests.call.paths import batch, expected
from tests.call.test_paths import branch, branch_in_a_branch, masked_values, newton

Tensor = torch.Tensor
pytestmark = [pytest.mark.usefixtures("paths_pay_early"), pytest.mark.rotating]

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 3": {"chunk_size": 3},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 7},
    "once": {"trace": "once"},
}


def sliced(r: Tensor) -> Tensor:
    """A slice from the sample's own start."""
    start = int(r.detach().abs().argmax())
    return r[start:].sum() * r * r


def scaled(r: Tensor) -> Tensor:
    """A number that is taken out of a tensor."""
    return r.sin() * r.detach().sum().round().item()


def masked_columns(r: Tensor) -> Tensor:
    """Columns of a matrix, selected by a mask, computed and put back."""
    matrix, mask = torch.outer(r, r.cos()), r > 0
    matrix[:, mask] = matrix[:, mask].sin() * 3
    return matrix.sum(0)


FUNCTIONS = [branch_in_a_branch, newton, masked_values, masked_columns, sliced, scaled]
SOME = [branch_in_a_branch, masked_columns, sliced]


def jacobian_of(function: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
    """One sample's Jacobian, row by row."""
    found = functional.jacobian(function, r, create_graph=r.requires_grad)
    assert isinstance(found, Tensor)
    return found


def hessian_of(function: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
    """One sample's Hessians of all elements of the result."""

    def differentiable(q: Tensor) -> Tensor:
        found = functional.jacobian(function, q, create_graph=True)
        assert isinstance(found, Tensor)
        return found

    return jacobian_of(differentiable, r)


def total(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The sum of what a function returns."""
    return lambda r: function(r).sum()


def close(got: Tensor, want: Tensor) -> None:
    """The same up to rounding, in every sample."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "jacobian"])
@pytest.mark.parametrize("function", SOME, ids=lambda f: f.__name__)
def test_jacobians(function: Callable[[Tensor], Tensor], transform: str, way: str) -> None:
    mapped = getattr(shardmap, transform)(function, **WAYS[way])
    for x in (batch(31), batch(29))[: 1 + (way == "once")]:
        close(mapped(x), expected(lambda r: jacobian_of(function, r), x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", SOME, ids=lambda f: f.__name__)
def test_hessians(function: Callable[[Tensor], Tensor], way: str) -> None:
    mapped = shardmap.hessian(function, **WAYS[way])
    for x in (batch(23), batch(19))[: 1 + (way == "once")]:
        close(mapped(x), expected(lambda r: hessian_of(function, r), x))


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian"])
def test_as_the_transforms_of_torch(transform: str) -> None:
    x = batch(61)
    want = expected(getattr(torch.func, transform)(branch), x)
    close(getattr(shardmap, transform)(branch)(x), want)


@pytest.mark.parametrize("way", ["plain", "two lanes"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_products(function: Callable[[Tensor], Tensor], way: str) -> None:
    x, v = batch(31), batch(31).flip(0)
    jacobians = expected(lambda r: jacobian_of(function, r), x)
    values, products = shardmap.jvp(function, **WAYS[way])(x, v)
    close(values, expected(function, x))
    close(products, torch.einsum("nij,nj->ni", jacobians, v))
    values, products = shardmap.vjp(function, **WAYS[way])(x, v)
    close(values, expected(function, x))
    close(products, torch.einsum("nij,ni->nj", jacobians, v))
    values, products = shardmap.hvp(total(function), **WAYS[way])(x, v)
    close(values, expected(function, x).sum(-1))
    hessians = expected(lambda r: hessian_of(total(function), r), x)
    close(products, torch.einsum("nij,nj->ni", hessians, v))


@pytest.mark.parametrize("way", ["chunk 3", "two lanes", "once"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_per_sample_gradients(function: Callable[[Tensor], Tensor], way: str) -> None:
    weight = torch.tensor([0.7, -1.2, 0.4])
    loss = lambda w, r: function(w * r).sum()
    mapped = shardmap.per_sample_grad(loss, **WAYS[way])
    for x in (batch(31), batch(29)):
        want = expected(lambda r: jacobian_of(lambda w: loss(w, r), weight), x)
        close(mapped(weight, x), want)


def test_per_sample_gradients_of_a_module() -> None:
    net = torch.nn.Linear(3, 3)
    loss = lambda out: branch(out).sum()
    for x in (batch(61), batch(59)):
        found = shardmap.per_sample_grad(net, loss, trace="once", chunk_size=7)(x)
        for name, p in net.named_parameters():
            close(found[name], expected(lambda r, p=p: torch.autograd.grad(loss(net(r)), p)[0], x))


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian"])
@pytest.mark.parametrize("function", [branch, masked_values])
def test_reduced_and_stored(function: Any, transform: str, tmp_path: Path) -> None:
    x = batch(31)
    one = hessian_of if transform == "hessian" else jacobian_of
    want = expected(lambda r: one(function, r), x)
    mapped = getattr(shardmap, transform)
    close(mapped(function, reduce="sum", chunk_size=7)(x), want.sum(0))
    sink = shardmap.MemmapSink(tmp_path / "rows")
    store = mapped(function, out=sink, chunk_size=7)(x)
    close(torch.as_tensor(store.read("result", 0, 31)), want)


@pytest.mark.parametrize("way", ["plain", "two lanes"])
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("function", [branch, masked_values])
def test_gradients_from_outside(function: Any, transform: str, way: str) -> None:
    found = []
    for run in (getattr(shardmap, transform)(function, **WAYS[way]),
                lambda x: expected(lambda r: jacobian_of(function, r), x)):  # fmt: skip
        x = batch(31).requires_grad_()
        first = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), x)[0]
        found.append((first, second))
    for got, want in zip(*found, strict=True):
        close(got, want)


@pytest.mark.parametrize("size", [0, 1, 2, 3])
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "jacobian"])
def test_small_batches(transform: str, size: int) -> None:
    x = batch(size)
    want = [jacobian_of(branch, r) for r in x]
    whole = torch.stack(want) if want else x.new_zeros(0, 3, 3)
    close(getattr(shardmap, transform)(branch)(x), whole)


def test_aux_goes_the_same_way() -> None:
    x = batch(61)
    both = lambda r: (branch(r), branch_in_a_branch(r))
    for transform in (shardmap.jacrev, shardmap.jacfwd):
        jacobians, aux = transform(both, has_aux=True)(x)
        close(jacobians, expected(lambda r: jacobian_of(branch, r), x))
        close(aux, expected(branch_in_a_branch, x))


def test_samples_that_are_too_few_for_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = batch(17)
    for transform in ("jacrev", "jacfwd", "jacobian", "hessian"):
        one = hessian_of if transform == "hessian" else jacobian_of
        mapped = getattr(shardmap, transform)(branch_in_a_branch)
        close(mapped(x), expected(lambda r, one=one: one(branch_in_a_branch, r), x))
