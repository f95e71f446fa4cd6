"""A map inside a map whose inner samples go different ways: every sample against the loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from tests import oracle
from tests.call.paths import batch, expected
from tests.call.test_paths import FUNCTIONS, branch, branch_in_a_branch, masked_values

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("paths_pay_early")

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 3": {"chunk_size": 3},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 7},
    "once": {"trace": "once"},
}


def rows(outer: int, inner: int) -> Tensor:
    """A batch of batches."""
    return batch(outer * inner).reshape(outer, inner, 3)


def both(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The loop inside the loop."""
    return lambda x: expected(lambda r: expected(function, r), x)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_sample_is_the_loops(function: Callable[[Tensor], Tensor]) -> None:
    x = rows(11, 5)
    got = shardmap.vmap(lambda r: shardmap.vmap(function)(r), chunk_size=4)(x)
    oracle.assert_same(got, both(function)(x), function.__name__)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", [branch, branch_in_a_branch, masked_values])
def test_ways_to_run(function: Callable[[Tensor], Tensor], way: str) -> None:
    inner = shardmap.vmap(function)
    mapped = shardmap.vmap(lambda r: inner(r), **WAYS[way])
    for x in (rows(31, 3), rows(29, 3)):
        oracle.assert_same(mapped(x), both(function)(x), function.__name__)


def test_no_sample_is_looped_where_many_answer_alike() -> None:
    """Outer samples are told apart by how many inner ones take a path, not by which."""
    x, calls = rows(300, 4), 0

    def function(r: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return branch(r)

    with warnings.catch_warnings():
        warnings.simplefilter("error", shardmap.SlowLoopWarning)
        got = shardmap.vmap(lambda r: shardmap.vmap(function)(r))(x)
    oracle.assert_same(got, both(branch)(x), "result")
    assert calls < 60


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 1), (1, 3), (3, 1), (2, 2)])
def test_small_batches(sizes: tuple[int, int]) -> None:
    x = torch.randn(*sizes, 3)
    got = shardmap.vmap(lambda r: shardmap.vmap(branch)(r))(x)
    want = torch.stack([branch(r) for r in x.reshape(-1, 3)]) if x.numel() else x
    torch.testing.assert_close(got, want.reshape(*sizes, 3))


def test_three_maps() -> None:
    x = batch(70).reshape(5, 7, 2, 3)
    got = shardmap.vmap(shardmap.vmap(lambda r: shardmap.vmap(branch)(r)))(x)
    oracle.assert_same(got, expected(both(branch), x), "result")


def test_questions_about_outer_and_inner_samples() -> None:
    def inner(q: Tensor, w: Tensor) -> Tensor:
        if q.sum() > 0:
            return q.sin() if w.sum() > 0 else q.cos()
        return q * w if w[0] > 0 else q / w

    def outer(r: Tensor, w: Tensor) -> Tensor:
        found = shardmap.vmap(inner, in_dims=(0, None))(r, w)
        return found if found[0, 0] > 0 else found * 2

    def loop(r: Tensor, w: Tensor) -> Tensor:
        found = torch.stack([inner(q, w) for q in r])
        return found if found[0, 0] > 0 else found * 2

    x, w = rows(61, 3), batch(61)
    got = shardmap.vmap(outer, chunk_size=7)(x, w)
    oracle.assert_same(got, expected(loop, x, w), "result")


def test_a_captured_outer_value_is_asked_before_inner_ones() -> None:
    """Which way the inner function goes first is decided by what the outer sample says."""

    def outer(run: Any, r: Tensor, w: Tensor) -> Tensor:
        def inner(q: Tensor) -> Tensor:
            q = q.exp() if w.sum() > 0 else q.sin() * 2
            return q + 1 if q.sum() > 1 else q * w

        return run(inner)(r)

    x, w = rows(61, 3), batch(61)
    got = shardmap.vmap(lambda r, v: outer(shardmap.vmap, r, v))(x, w)
    loop = lambda f: lambda t: expected(f, t)
    oracle.assert_same(got, expected(lambda r, v: outer(loop, r, v), x, w), "result")


@pytest.mark.parametrize("way", ["plain", "two lanes"])
@pytest.mark.parametrize("function", [branch, branch_in_a_branch, masked_values])
def test_first_and_second_gradients(function: Callable[[Tensor], Tensor], way: str) -> None:
    mapped = shardmap.vmap(lambda r: shardmap.vmap(function)(r), **WAYS[way])
    found = []
    for run in (mapped, both(function)):
        x = rows(17, 3).requires_grad_()
        first = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)[0]
        found.append((first, torch.autograd.grad(first.square().sum(), x)[0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_inside_the_outer_function() -> None:
    def outer(run: Any, r: Tensor) -> Tensor:
        return torch.func.grad(lambda t: run(t).square().sum())(r)

    x = rows(31, 3)
    got = shardmap.vmap(lambda r: outer(shardmap.vmap(branch), r))(x)
    want = expected(lambda r: outer(lambda t: expected(branch, t), r), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_the_inner_map_reduces(how: str) -> None:
    x = rows(31, 3)
    want = both(branch)(x)
    reduced = want.amax(1) if how == "max" else getattr(want, how)(1)
    got = shardmap.vmap(lambda r: shardmap.vmap(branch, reduce=how)(r))(x)
    torch.testing.assert_close(got, reduced)


def test_the_outer_map_reduces_and_stores(tmp_path: Path) -> None:
    x = rows(31, 3)
    want, inner = both(branch)(x), shardmap.vmap(branch)
    got = shardmap.vmap(lambda r: inner(r), reduce="sum", chunk_size=7)(x)
    torch.testing.assert_close(got, want.sum(0))
    sink = shardmap.MemmapSink(tmp_path / "rows")
    store = shardmap.vmap(lambda r: inner(r), out=sink, chunk_size=7)(x)
    oracle.assert_same(store.read("result", 0, 31), want, "stored")


def test_derivatives_inside_the_outer_function() -> None:
    x = rows(17, 3)
    got = shardmap.vmap(lambda r: shardmap.jacrev(branch)(r))(x)
    want = expected(lambda r: expected(torch.func.jacrev(branch), r), x)
    torch.testing.assert_close(got, want)


def test_inner_arguments_that_are_written_are_served_one_by_one() -> None:
    def function(q: Tensor) -> Tensor:
        if q.sum() > 0:
            q.mul_(2)
        return q.sum()

    own, theirs = rows(9, 2), rows(9, 2)
    want = both(function)(theirs)
    got = shardmap.vmap(lambda r: shardmap.vmap(function)(r))(own)
    oracle.assert_same(got, want, "result")
    oracle.assert_same(own, theirs, "argument")


def test_draws_on_one_way_of_the_inner_map() -> None:
    x = rows(17, 3)

    def outer(r: Tensor) -> Tensor:
        draw = lambda q: q if q.sum() > 0 else q + torch.rand(3)
        return shardmap.vmap(draw, randomness="different")(r)

    found = []
    ways: list[dict[str, Any]] = [
        {},
        {"chunk_size": 3},
        {"devices": ["cpu", "cpu"], "chunk_size": 2},
    ]
    for options in ways:
        torch.manual_seed(3)
        found.append(shardmap.vmap(outer, randomness="different", **options)(x))
    assert all(torch.equal(found[0], other) for other in found[1:])
    drawn = (found[0] - x)[x.sum(-1) <= 0]
    assert ((drawn >= -1e-6) & (drawn < 1)).all()
    assert len(drawn.unique(dim=0)) == len(drawn)
    assert torch.equal(found[0][x.sum(-1) > 0], x[x.sum(-1) > 0])


def test_draws_that_decide_the_way_of_an_inner_sample_are_refused() -> None:
    x = rows(17, 3)
    draw = lambda q: q if torch.rand(()) > 0.5 else q * 2
    outer = lambda r: shardmap.vmap(draw, randomness="different")(r)
    with pytest.raises(errors.RandomnessError, match="pass them in as an argument"):
        shardmap.vmap(outer, randomness="different")(x)
