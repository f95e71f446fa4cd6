"""Operators are compared one by one, from the recorded operands, before one is called wrong."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import shardmap
from shardmap.rules import registry
from tests import oracle

torch.manual_seed(0)
WEIGHT = torch.randn(64, 64)
x = torch.randn(5, 64)


def chaotic(y: torch.Tensor) -> torch.Tensor:
    """A recurrence in which rounding grows until nothing agrees."""
    for _ in range(60):
        y = torch.tanh(3 * (WEIGHT @ y) / 4)
    return y


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    rules = dict(registry._rules)
    shardmap.clear_caches()
    yield
    registry._rules.clear()
    registry._rules.update(rules)
    shardmap.clear_caches()


def test_a_chaotic_function_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """Its batched products round differently; no operator falls to a loop, without a warning."""
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "shardmap"):
        warnings.simplefilter("error", shardmap.SlowLoopWarning)
        for options in ({}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}):
            got = shardmap.vmap(lambda r: (chaotic(r), torch.zeros_like(r)), **options)(x)
            assert [tuple(t.shape) for t in got] == [(5, 64), (5, 64)]
            assert not got[1].any()
            assert got[0].abs().max() <= 1
    assert not caplog.records
    plan = shardmap.plan(chaotic)(x)
    assert "loop" not in plan.explain().partition("Memory")[0]


@torch.library.custom_op("shardmap_apart_test::twice", mutates_args=())
def twice(t: torch.Tensor) -> torch.Tensor:
    """An operator whose rule is wrong."""
    return t * 2


def test_only_the_wrong_operator_is_served_by_a_lower_tier(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @shardmap.batching_rule(torch.ops.shardmap_apart_test.twice.default)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(lambda t: t * 2.01, *args)

    def function(r: torch.Tensor) -> torch.Tensor:
        return (WEIGHT @ torch.ops.shardmap_apart_test.twice(r).sin()).tanh()

    with (
        caplog.at_level(logging.WARNING, "shardmap"),
        pytest.warns(shardmap.SlowLoopWarning, match="the rule that batches.*is wrong"),
    ):
        oracle.assert_same(
            shardmap.vmap(function)(x), torch.stack([function(r) for r in x]), "output"
        )
    assert "twice" in caplog.text
    text = shardmap.plan(function)(x).explain()
    assert text.count("loop over the samples") == 1, text


def test_a_wrong_operator_in_a_chaotic_function_is_found() -> None:
    """Outputs that differ anyway hide nothing: the operator by itself is wrong."""

    @shardmap.batching_rule(torch.ops.shardmap_apart_test.twice.default)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(lambda t: t * 2.5, *args)

    function = lambda r: chaotic(torch.ops.shardmap_apart_test.twice(r) / 2)
    with pytest.warns(shardmap.SlowLoopWarning, match="shardmap_apart_test::twice"):
        shardmap.vmap(function)(x)


def test_a_wrong_operator_beside_random_draws_is_found() -> None:
    """A replay draws other numbers than the function did; they are given to the operators."""

    @shardmap.batching_rule(torch.ops.shardmap_apart_test.twice.default)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(lambda t: t * 2.5, *args)

    def function(r: torch.Tensor) -> Any:
        return torch.rand_like(r), torch.ops.shardmap_apart_test.twice(r + torch.rand(64) * 0)

    with pytest.warns(shardmap.SlowLoopWarning, match="shardmap_apart_test::twice"):
        draws, doubled = shardmap.vmap(function, randomness="different")(x)
    torch.testing.assert_close(doubled, x * 2)
    assert draws.unique().numel() > 300


def test_in_place_calls_and_views_are_compared_too() -> None:
    @shardmap.batching_rule(torch.ops.shardmap_apart_test.twice.default)
    def rule(b: Any, eq: Any, args: Any, kwargs: Any) -> Any:
        return b.call(lambda t: t * 2.5, *args)

    def function(r: torch.Tensor) -> torch.Tensor:
        memory = torch.zeros(8, 8)
        memory[1:3].copy_(r[:16].view(2, 8))
        memory.t()[4].add_(torch.ops.shardmap_apart_test.twice(r[:8]))
        return memory

    with pytest.warns(shardmap.SlowLoopWarning, match="shardmap_apart_test::twice"):
        got = shardmap.vmap(function)(x)
    oracle.assert_same(got, torch.stack([function(r) for r in x]), "output")


class Mixed(torch.nn.Module):
    """A layer of float32 whose results are scaled in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.scale = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        return (self.layer(row).double() * self.scale).float()[..., :2]


def test_rounding_before_a_wider_dtype_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """A batched product rounds as float32 does, which shows where it is cast to float64."""
    loss = torch.nn.functional.mse_loss
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "shardmap"):
        warnings.simplefilter("error", shardmap.SlowLoopWarning)
        for seed in range(25):
            shardmap.clear_caches()
            torch.manual_seed(seed)
            model, rows, targets = Mixed(), torch.randn(3, 4), torch.randn(3, 2)
            got = shardmap.per_sample_grad(model, loss)(rows, targets)
            for i in range(3):
                wanted = torch.autograd.grad(
                    loss(model(rows[i]), targets[i]), list(model.parameters())
                )
                for g, w in zip(got.values(), wanted, strict=True):
                    torch.testing.assert_close(g[i], w, rtol=1e-4, atol=1e-5)
    assert not caplog.records
