"""`trace="once"`: how often the function runs, which arguments it may have, and what is refused."""

from __future__ import annotations

import itertools
import logging
import types

import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from shardmap.call.reachable import Unknown, reachable
from tests import oracle
from tests.call.runs import counting

x = torch.arange(6.0).view(3, 2) + 1


def test_the_function_is_not_run_again() -> None:
    weight = torch.ones(2, requires_grad=True)

    def function(r: torch.Tensor) -> torch.Tensor:
        return r * weight

    mapped = shardmap.vmap(function, trace="once")
    with counting(function) as calls:
        for size in (3, 2, 3, 1):
            oracle.assert_same(mapped(x[:size]), x[:size] * weight, "output")
        assert calls() == 3, "first and last sample, and once for batches of one sample"
        mapped(x.double())
        assert calls() == 5
        mapped(x.t().contiguous().t())
        assert calls() == 7, "rows with other strides"
        for _ in range(3):
            mapped(x)
        assert calls() == 7


def test_unmapped_arguments_are_bound_at_each_call() -> None:
    def function(r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return r * w

    mapped = shardmap.vmap(function, (0, None), trace="once")
    with counting(function) as calls:
        for k in range(3):
            oracle.assert_same(mapped(x, torch.full((2,), float(k))), x * k, "output")
    assert calls() == 2, "the first and the last sample"


def test_an_argument_that_is_captured_too() -> None:
    """The same tensor by two ways in.

    They are recorded as one, so that another argument must not replace both.
    """
    weight, other = torch.tensor([2.0, 3.0]), torch.ones(2)
    mapped = shardmap.vmap(lambda r, w: r * w + weight, (0, None), trace="once")
    for w in (weight, other, weight):
        oracle.assert_same(mapped(x, w), x * w + weight, "output")


def test_one_argument_passed_twice() -> None:
    a, b = torch.tensor([2.0, 3.0]), torch.ones(2)
    mapped = shardmap.vmap(lambda r, v, w: r * v + w, (0, None, None), trace="once")
    for v, w in ((a, a), (a, b), (b, a), (b, b)):
        oracle.assert_same(mapped(x, v, w), x * v + w, "output")


def test_an_object_as_argument() -> None:
    settings = types.SimpleNamespace(scale=2.0)
    mapped = shardmap.vmap(lambda r, s: r * s.scale, (0, None), trace="once")
    oracle.assert_same(mapped(x, settings), x * 2, "before")
    settings.scale = 5.0
    oracle.assert_same(mapped(x, settings), x * 5, "after")


def test_a_module_as_argument() -> None:
    layer = nn.Linear(2, 2)

    def function(r: torch.Tensor, m: nn.Module) -> torch.Tensor:
        return m(r)

    mapped = shardmap.vmap(function, (0, None), trace="once")
    with counting(function) as calls:
        oracle.assert_same(mapped(x, layer), layer(x), "before")
        mapped(x, layer)
    assert calls() == 2, "the first and the last sample"
    layer.weight = nn.Parameter(torch.ones(2, 2))
    oracle.assert_same(mapped(x, layer), layer(x), "after")


def test_what_cannot_be_found_is_recorded_each_time(caplog: pytest.LogCaptureFixture) -> None:
    hidden = torch.ones(2, requires_grad=True)
    hidden.grad = torch.ones(2)

    def function(r: torch.Tensor) -> torch.Tensor:
        return r * hidden.grad

    mapped = shardmap.vmap(function, trace="once")
    with caplog.at_level(logging.WARNING, "shardmap"):
        oracle.assert_same(mapped(x), x, "before")
    assert "records at each call" in caplog.text
    assert "shape (2,)" in caplog.text
    hidden.grad = torch.full((2,), 3.0)
    oracle.assert_same(mapped(x), x * 3, "after")


def test_an_iterator_is_refused() -> None:
    """The loop takes a number for each sample, a recording one for all."""
    for trace in ("each", "once"):
        numbers = itertools.count(1)
        mapped = shardmap.vmap(lambda r, numbers=numbers: r * next(numbers), trace=trace)
        with pytest.raises(errors.EscapeError, match="something else each time"):
            mapped(x)
        assert mapped(x[:1]).shape == (1, 2), "one sample takes one number"


def test_an_iterator_is_recorded_each_time(caplog: pytest.LogCaptureFixture) -> None:
    numbers = itertools.count(1)

    def function(r: torch.Tensor) -> torch.Tensor:
        return r * next(numbers)

    mapped = shardmap.vmap(function, trace="once", check="off")
    with caplog.at_level(logging.WARNING, "shardmap"):
        oracle.assert_same(mapped(x[:1]), x[:1], "first")
    assert "iterator" in caplog.text
    oracle.assert_same(mapped(x[:1]), x[:1] * 2, "second")


def test_more_than_can_be_listed_is_recorded_each_time() -> None:
    values = [0.0] * 200_001
    assert any(type(found) is Unknown for found in reachable(lambda: values))


def test_a_value_read_by_python_is_refused() -> None:
    """Nothing would notice that it has changed; recording at each call may read it."""
    weight = torch.ones(2)
    read = lambda r: r * float(weight.numpy()[0])
    with pytest.raises(errors.EscapeError, match="trace='each'"):
        shardmap.vmap(read, trace="once")(x)
    oracle.assert_same(shardmap.vmap(read)(x), x, "each")
    listed = shardmap.vmap(lambda r: r * weight.tolist()[0], trace="once")
    for factor in (1.0, 3.0, 0.5):
        weight.fill_(factor)
        oracle.assert_same(listed(x), x * factor, "asked again")


def test_writes_are_checked_at_each_call() -> None:
    """Recorded with memory of their own, called with memory that is shared."""

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        return a * b

    mapped = shardmap.vmap(function, trace="once")
    mapped(x.clone(), x.clone())
    shared = x.clone()
    with pytest.raises(errors.CapturedWriteError):
        mapped(shared, shared[:])
    assert torch.equal(shared, x)


def test_hooks_of_all_modules_are_noticed() -> None:
    linear, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    mapped = shardmap.vmap(linear, trace="once")
    before = mapped(x)
    torch.testing.assert_close(before, linear(x))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, out: out * 5)
    try:
        torch.testing.assert_close(mapped(x), before * 5)
    finally:
        handle.remove()
    torch.testing.assert_close(mapped(x), before)
