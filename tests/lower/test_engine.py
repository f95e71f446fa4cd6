"""Lowering happens once per program, and says what it could not batch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from shardmap.lower import cache as engine
from tests import oracle

x = torch.arange(6.0).view(3, 2) + 1


@torch.library.custom_op("shardmap_engine_test::odd", mutates_args=())
def odd(t: torch.Tensor) -> torch.Tensor:
    """An operator that nothing batches."""
    return t * 2


@pytest.fixture
def lowerings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that have been lowered, in order."""
    done: list[Any] = []
    original = engine.lower_with

    def counting(program: Any, *rest: Any) -> Any:
        done.append(program)
        return original(program, *rest)

    monkeypatch.setattr(engine, "lower_with", counting)
    shardmap.clear_caches()
    return done


def count(lowerings: list[Any], call: Callable[[], Any]) -> int:
    before = len(lowerings)
    call()
    return len(lowerings) - before


def test_the_same_program_is_lowered_once(lowerings: list[Any]) -> None:
    """By any map, for any number of samples, chunks and shards."""

    def function(r: torch.Tensor) -> torch.Tensor:
        return (r * 0.3).sin()

    assert count(lowerings, lambda: shardmap.vmap(function)(x)) == 1
    assert count(lowerings, lambda: shardmap.vmap(function)(x + 1)) == 0
    assert count(lowerings, lambda: shardmap.vmap(function)(x[:1])) == 0
    assert count(lowerings, lambda: shardmap.vmap(function, chunk_size=2)(x)) == 0
    assert count(lowerings, lambda: shardmap.vmap(function, devices=["cpu", "cpu"])(x)) == 0
    assert count(lowerings, lambda: shardmap.vmap(lambda r: (r * 0.3).sin(), 0)(x)) <= 1, (
        "another name in errors"
    )


def test_a_learning_rate_may_change(lowerings: list[Any]) -> None:
    """Floats of arithmetic are inputs of the program: values change, the lowering stays."""
    model = nn.Linear(2, 1)
    rates = [0.1, 0.25, -3.0, 0.0, float("inf")]

    def step(r: torch.Tensor, rate: float) -> Any:
        gradient = torch.autograd.grad(model(r).sum().square(), model.weight)[0]
        return model.weight.detach() - rate * gradient

    for i, rate in enumerate(rates):
        got: list[torch.Tensor] = []

        def call(rate: float = rate, got: list[torch.Tensor] = got) -> None:
            got.append(shardmap.vmap(step, (0, None))(x, rate))

        assert count(lowerings, call) == (i == 0)
        oracle.assert_same(
            got[0], oracle.loop(lambda r, rate=rate: step(r, rate))(x), f"rate {rate}"
        )


@pytest.mark.parametrize("first", [0.0, 1.0, 1, True, 2j])
@pytest.mark.parametrize("second", [-0.0, 1.0, 1, True, 2.0])
def test_equal_numbers_are_not_the_same_program(first: Any, second: Any) -> None:
    """`1 == 1.0 == True` and `0.0 == -0.0`."""
    for value in (first, second):
        got = shardmap.vmap(lambda r, v=value: torch.full((2,), v) + 0 * r.to(torch.int8))(x)
        want = (torch.full((2,), value) + torch.zeros(2, dtype=torch.int8)).expand(3, 2)
        oracle.assert_same(got, want, repr(value))


def test_another_kind_of_call_is_another_program(lowerings: list[Any]) -> None:
    """Shapes, dtypes, grad mode and outer autograd each decide how a program is lowered."""

    def function(r: torch.Tensor) -> torch.Tensor:
        return r * r

    assert count(lowerings, lambda: shardmap.vmap(function)(x)) == 1
    assert count(lowerings, lambda: shardmap.vmap(function)(x.double())) == 1
    assert count(lowerings, lambda: shardmap.vmap(function)(x[:, :1].contiguous())) == 1
    assert count(lowerings, lambda: shardmap.vmap(function)(x.clone().requires_grad_())) == 1
    assert count(lowerings, lambda: shardmap.vmap(function)(x)) == 0


def test_the_warning_names_operator_and_line() -> None:
    def function(r: torch.Tensor) -> torch.Tensor:
        return torch.ops.shardmap_engine_test.odd(r) + 1  # this line

    source, start = inspect.getsourcelines(function)
    line = start + next(i for i, text in enumerate(source) if "this line" in text)
    with pytest.warns(shardmap.SlowLoopWarning) as caught:
        oracle.assert_same(shardmap.vmap(function)(x), x * 2 + 1, "output")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "shardmap_engine_test::odd" in message
    assert f"{__file__}:{line}" in message
    with pytest.raises(errors.UnsupportedOperatorError, match="shardmap_engine_test::odd"):
        shardmap.vmap(function, strict=True)(x)


def test_the_warning_names_the_line_of_a_repeated_recording() -> None:
    """Lowered again for another layout, from a recording that only repeated the last one."""

    def function(r: torch.Tensor) -> torch.Tensor:
        return torch.ops.shardmap_engine_test.odd(r)

    for batch in (x[:, :1].contiguous(), x[:, :1]):
        with pytest.warns(shardmap.SlowLoopWarning, match=__file__):
            shardmap.vmap(function)(batch)


def test_strict_serves_what_needs_no_loop() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oracle.assert_same(
            shardmap.vmap(lambda r: (r * 2).sum(), strict=True)(x), (x * 2).sum(1), "output"
        )


def test_the_cache_forgets_the_oldest(
    monkeypatch: pytest.MonkeyPatch, lowerings: list[Any]
) -> None:
    for kept in (engine._drafts, engine._lowered, engine._by_identity):
        monkeypatch.setattr(kept, "capacity", 2)

    def call(n: int) -> None:
        shardmap.vmap(lambda r: r.repeat(n))(x)

    assert [count(lowerings, lambda n=n: call(n)) for n in (1, 2, 1, 3, 1, 2)] == [1, 1, 0, 1, 0, 1]
    assert len(engine._lowered) == 2
    assert len(engine._by_identity) <= 2
