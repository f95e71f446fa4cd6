"""Samples with answers of their own: every sample against the loop, and how often each is run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import shardmap
from shardmap.call import routes, spread
from shardmap.call.spread import Asked, Spread
from tests import oracle
from tests.call.paths import WAYS, batch, expected

Tensor = torch.Tensor
SIZE = 131
"""More than a path is worth, so that batches could be split."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Nothing is known of earlier tests' functions, and loops are expected here."""
    shardmap.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
        yield


def a_number(r: Tensor) -> Tensor:
    """Uses a float of the sample's."""
    return (r * r.sum().item()).sin()


def as_many_steps_as_it_says(r: Tensor) -> Tensor:
    """Takes 0 to 96 steps."""
    for _ in range(int(r[0].abs() * 1000) % 97):
        r = r * 0.99 + 0.01
    return r


def selected(r: Tensor) -> Tensor:
    """Asks for shapes, and then for a number of what was selected."""
    return r * r[r > 0].sum().item()


def two_results(r: Tensor) -> dict[str, Any]:
    """A dictionary with a scalar, and a vector that is written in place."""
    out = torch.zeros(3)
    out[int(r.argmax())] = r.max().item()
    return {"written": out + r, "sum": r.sum() * r[0].item()}


FUNCTIONS = {f.__name__: f for f in (a_number, as_many_steps_as_it_says, selected)}
OWN_WAYS = {way: options for way, options in WAYS.items() if way != "strict"}


@pytest.mark.parametrize("way", OWN_WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name: str, way: str) -> None:
    function = FUNCTIONS[name]
    mapped = shardmap.vmap(function, **OWN_WAYS[way])
    for shift in (0.0, 0.0, 0.3):
        x = batch(SIZE) + shift
        oracle.assert_same(mapped(x), expected(function, x), f"shifted by {shift}")


@pytest.mark.parametrize("way", ["plain", "chunk 1", "chunk 3", "two lanes", "once"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name: str, way: str) -> None:
    function = FUNCTIONS[name]
    mapped = shardmap.vmap(function, **OWN_WAYS[way])
    x, weight = batch(SIZE).requires_grad_(), batch(SIZE) + 2
    for _ in range(2):
        got = torch.autograd.grad((mapped(x) * weight).sum(), x)[0]
        want = torch.autograd.grad((expected(function, x) * weight).sum(), x)[0]
        oracle.assert_same(got, want, "gradient")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 64, 127])
def test_sizes(size: int) -> None:
    x = batch(size)
    mapped = shardmap.vmap(a_number)
    for _ in range(3):
        got = mapped(x)
        oracle.assert_same(got, expected(a_number, x) if size else torch.empty(0, 3), "result")


@pytest.mark.parametrize("way", ["plain", "chunk 3", "two lanes"])
def test_gradients_of_rows_that_are_written(way: str) -> None:
    def function(r: Tensor) -> Tensor:
        if r[0].item() > 0:
            r.mul_(2)
        return r * r.sum().item()

    got, want = batch(SIZE).requires_grad_(), batch(SIZE).requires_grad_()
    mapped = shardmap.vmap(function, **OWN_WAYS[way])(got * 1)
    own = want * 1
    looped = torch.stack([function(own[i]) for i in range(SIZE)])
    oracle.assert_same(mapped, looped, "result")
    weight = batch(SIZE) + 2
    grads = [torch.autograd.grad((o * weight).sum(), x) for o, x in ((mapped, got), (looped, want))]
    oracle.assert_same(grads[0][0], grads[1][0], "gradient")


def test_structures_and_reductions() -> None:
    x = batch(SIZE)
    rows = [two_results(r) for r in x]
    for options in ({}, {"chunk_size": 3}, {"devices": ["cpu", "cpu"], "chunk_size": 7}):
        got = shardmap.vmap(two_results, **options)(x)
        reduced = shardmap.vmap(two_results, reduce="sum", **options)(x)
        for key in ("written", "sum"):
            want = torch.stack([row[key] for row in rows])
            oracle.assert_same(got[key], want, key)
            oracle.assert_same(reduced[key], want.sum(0), f"sum of {key}")


def counted(function: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    calls = [0]

    def counting(r: Tensor) -> Tensor:
        calls[0] += 1
        return function(r)

    return counting, calls


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_sample_is_run_once_and_a_few_twice(name: str) -> None:
    function, calls = counted(FUNCTIONS[name])
    x = batch(1000)
    mapped = shardmap.vmap(function)
    for turn in range(6):
        calls[0] = 0
        oracle.assert_same(mapped(x), expected(FUNCTIONS[name], x), "result")
        again = turn == 0  # the first sample, to see that it does the same each time
        assert calls[0] <= 1000 + 2 + again + 1000 // spread.TRIED_OF


def test_the_warning_names_the_line() -> None:
    with pytest.warns(
        shardmap.SlowLoopWarning, match=r"different sequences.*test_many_answers\.py"
    ):
        shardmap.vmap(a_number)(batch(SIZE))


def test_a_batch_is_split_once_samples_answer_alike() -> None:
    """The first calls give each sample answers of its own; then there are two ways."""
    function, calls = counted(lambda r: r * 2 if r.sum().item() > 0 else r.exp())
    first, x = batch(SIZE), batch(1000).sign()
    mapped = shardmap.vmap(function)
    oracle.assert_same(mapped(first), torch.stack([function(r) for r in first]), "own answers")
    want, counts = torch.stack([function(r) for r in x]), []
    for _ in range(40):
        calls[0] = 0
        oracle.assert_same(mapped(x), want, "two ways")
        counts.append(calls[0])
    assert counts[-1] < 20


def test_what_is_tried_leaves_nothing() -> None:
    """Captured tensors, their gradients and random states are as the loop leaves them."""
    weight = torch.ones(3, requires_grad=True)

    def function(r: Tensor) -> Tensor:
        value = r.sum().item()
        return torch.autograd.grad((weight * r).sin().sum(), weight)[0] * value

    x = batch(1000)
    torch.manual_seed(0)
    np.random.seed(0)
    got = shardmap.vmap(function)(x)
    drawn = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert torch.equal(drawn[0], torch.rand(1))
    assert drawn[1] == np.random.rand()
    assert weight.grad is None
    oracle.assert_same(got, expected(function, x), "result")


def test_samples_in_which_a_captured_tensor_is_written_are_not_tried() -> None:
    state = torch.zeros(3)
    with pytest.raises(RuntimeError, match="writes to what was there before"), Asked([]):
        state.view(3)[:1].add_(1)
    with pytest.raises(RuntimeError, match="draws"), Asked([]):
        torch.rand(3)
    assert torch.equal(state, torch.zeros(3))
    weight = torch.ones(3, requires_grad=True)
    with Asked([]) as asked:
        (weight * 2).sum().backward()
        made = torch.zeros(3)
        made[0] = 5
        assert bool(made.sum() > 4)
    assert weight.grad is None
    assert asked.answers == ["True"]


def test_a_split_is_judged_by_all_calls() -> None:
    seen = Spread()
    seen.look([("a",), ("b",), ("c",)], 256, routes.WORTH_KNOWN, routes.WORTH)
    assert not seen.splits
    assert seen.is_due()
    seen.look([("a",)] * 5, 256, routes.WORTH_KNOWN, routes.WORTH)
    assert seen.splits
    assert not seen.is_due()
    seen.was_split(served=10, size=256)
    assert not seen.splits
    waits = []
    for _ in range(4):
        waits.append(0)
        while not seen.is_due():
            waits[-1] += 1
        seen.look([(object(),) for _ in range(64)], 256, routes.WORTH_KNOWN, routes.WORTH)
    assert waits == sorted(waits)
    assert waits[-1] > 3


def test_other_samples_are_tried_in_each_call() -> None:
    seen = Spread()
    numbers = [number for _ in range(10) for number in seen.next_tried(1024)]
    assert len(numbers) == len(set(numbers)) == 80
    assert all(0 <= number < 1024 for number in numbers)
    assert max(b - a for a, b in zip(sorted(numbers), sorted(numbers)[1:], strict=False)) < 64
    assert Spread().next_tried(100) == []


def test_the_warning_about_one_tried_sample_is_in_the_singular() -> None:
    """`check="off"` runs the function on the first sample alone."""

    def function(row: Tensor) -> Tensor:
        return row * row.sum().item()

    rows = torch.randn(70, 3)
    text = r"one sample was tried, and gave answers to what python asks .* on 70 samples"
    with pytest.warns(shardmap.SlowLoopWarning, match=text):
        found = shardmap.vmap(function, check="off")(rows)
    torch.testing.assert_close(found, torch.stack([function(row) for row in rows]))
    shardmap.clear_caches()
    with pytest.warns(
        shardmap.SlowLoopWarning, match=r"2 samples that were tried gave 2 different"
    ):
        shardmap.vmap(function)(rows)
