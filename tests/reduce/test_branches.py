"""Reductions of functions whose samples go different ways, against the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import shardmap
from tests.call.paths import batch, expected
from tests.call.test_paths import branch, branch_in_a_branch, masked_values

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("paths_pay_early")

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 3": {"chunk_size": 3},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 7},
    "once": {"trace": "once"},
}


@pytest.fixture
def net() -> nn.Module:
    """A layer before a branch."""
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def loss(out: Tensor) -> Tensor:
    """A loss that goes two ways."""
    return branch(out).sum()


def rows_of(net: nn.Module, x: Tensor) -> Tensor:
    """Each sample's gradient, flat: the loop."""
    found = [torch.autograd.grad(loss(net(r)), list(net.parameters())) for r in x]
    return torch.stack([torch.cat([t.reshape(-1) for t in grads]) for grads in found])


def flat(found: dict[str, Tensor]) -> Tensor:
    """What was found of all parameters, in one row."""
    return torch.cat([t.reshape(-1) for t in found.values()])


def close(got: Tensor, want: Tensor) -> None:
    """The same up to rounding."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_reductions_of_per_sample_gradients(net: nn.Module, way: str) -> None:
    reduced = lambda how: shardmap.per_sample_grad(net, loss, reduce=how, **WAYS[way])
    gram, norm = reduced("gram"), reduced("norm")
    clipped, second = reduced(shardmap.reduce.clipped_sum(1.0)), reduced("second_moment")
    for x in (batch(61), batch(59)):
        rows = rows_of(net, x)
        close(gram(x), rows @ rows.T)
        close(norm(x), rows.norm(dim=1))
        scale = (1 / rows.norm(dim=1, keepdim=True)).clamp(max=1)
        close(flat(clipped(x)), (rows * scale).sum(0))
        close(flat(second(x)), rows.square().mean(0))


@pytest.mark.parametrize("way", WAYS)
def test_projections_are_those_of_each_sample_alone(net: nn.Module, way: str) -> None:
    how = shardmap.reduce.project(5, seed=0)
    x = batch(31)
    alone = shardmap.per_sample_grad(net, loss, reduce=how)
    want = torch.cat([alone(r[None]) for r in x])
    close(shardmap.per_sample_grad(net, loss, reduce=how, **WAYS[way])(x), want)


@pytest.mark.parametrize("size", [1, 2, 3, 17])
@pytest.mark.parametrize("function", [branch, branch_in_a_branch, masked_values])
def test_gram_of_a_function(function: Any, size: int) -> None:
    x = batch(size)
    rows = expected(function, x)
    close(shardmap.vmap(function, reduce="gram")(x), rows @ rows.T)


def test_gram_beside_other_reductions() -> None:
    def function(r: Tensor) -> dict[str, Tensor]:
        y = branch_in_a_branch(r)
        return {"sum": y, "compared": y, "stacked": branch(r), "plain": r * 2}

    x = batch(61)
    how = {"sum": "sum", "compared": "gram", "stacked": None, "plain": None}
    found = shardmap.vmap(function, reduce=how, chunk_size=7)(x)
    rows = expected(branch_in_a_branch, x)
    close(found["sum"], rows.sum(0))
    close(found["compared"], rows @ rows.T)
    close(found["stacked"], expected(branch, x))
    close(found["plain"], x * 2)


def test_gradients_through_gram() -> None:
    found = []
    for of in (shardmap.vmap(branch, reduce="gram"),
               lambda x: expected(branch, x) @ expected(branch, x).T):  # fmt: skip
        x = batch(31).requires_grad_()
        first = torch.autograd.grad(of(x).sin().sum(), x, create_graph=True)[0]
        found.append((first, torch.autograd.grad(first.square().sum(), x)[0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_gram_where_samples_are_run_one_by_one() -> None:
    function = lambda r: r * r.sum().item()
    x = batch(61)
    rows = expected(function, x)
    close(shardmap.vmap(function, reduce="gram", max_paths=3)(x), rows @ rows.T)


def test_a_plan_of_gram_says_the_ways(net: nn.Module) -> None:
    x = batch(61)
    plan = shardmap.per_sample_grad(net, loss, reduce="gram").plan(x)
    text = plan.explain()
    assert "Samples go 2 ways by what python asks about their values:" in text
    rows = rows_of(net, x)
    close(plan.run(), rows @ rows.T)
