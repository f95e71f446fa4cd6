"""Tests of a Jacobian's mode, and of the number of rows that it takes at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardmap
from benchmarks.memory import Watch
from shardmap import errors
from tests.transforms.functions import NoForward, close, loop


def test_auto_takes_the_cheaper_mode_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    widening, narrowing = (
        nn.Linear(2, 50).requires_grad_(False),
        nn.Linear(50, 2).requires_grad_(False),
    )
    for net, mode, width in ((widening, "forward", 2), (narrowing, "reverse", 50)):
        with caplog.at_level(logging.INFO, "shardmap"):
            mapped = shardmap.jacobian(net)
            assert mapped.method is None
            found = mapped(torch.randn(3, width))
        assert mapped.method == mode
        assert f"takes {mode} mode" in caplog.text
        torch.testing.assert_close(found, net.weight.expand(3, -1, -1))
        caplog.clear()
    assert shardmap.jacobian(widening, method="reverse").method == "reverse"


def test_auto_takes_the_mode_that_there_is(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    wide = torch.randn(50, 2, dtype=torch.float64)
    mapped = shardmap.jacobian(lambda row: NoForward.apply(wide @ row))
    with caplog.at_level(logging.INFO, "shardmap"):
        close(mapped(x), loop(torch.func.jacfwd(lambda row: (wide @ row).sin()), x))
    assert mapped.method == "reverse"
    assert "takes reverse mode, for in forward mode" in caplog.text


def test_a_hessian_without_forward_formula_takes_two_backward_passes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x, y = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def through(sine: Callable[..., Any]) -> Callable[..., Any]:
        return lambda p, q: sine(p).cumsum(0) * sine(q).sum() ** 2

    for argnums in (0, (0, 1)):
        with caplog.at_level(logging.INFO, "shardmap"):
            found = shardmap.hessian(through(NoForward.apply), argnums, seed_chunk_size=3)(x, y)
        close(found, loop(torch.func.hessian(through(torch.sin), argnums), x, y))
        assert "two backward passes" in caplog.text
        caplog.clear()


def test_a_large_jacobian_of_one_sample_is_cut_into_rows() -> None:
    inner = torch.randn(300, 300) / 17
    outer = torch.randn(20_000, 300) / 17

    def function(x: torch.Tensor) -> torch.Tensor:
        return outer @ torch.tanh(inner @ x)

    x = torch.randn(2, 300)
    for transform in (shardmap.jacrev, shardmap.jacfwd):
        plan = transform(function, memory_budget="256MiB").plan(x)
        assert plan.fits
        with Watch("cpu") as watch:
            found = plan.run()
        assert watch.peak < 256 << 20
        torch.testing.assert_close(
            found[1], torch.func.jacfwd(function)(x[1]), rtol=1e-3, atol=1e-4
        )


def test_a_plan_that_does_not_fit_takes_fewer_rows() -> None:
    weight = torch.randn(400, 400) / 20

    def function(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.tanh(weight @ x)
        return x

    x = torch.randn(2, 400)
    whole = shardmap.jacrev(function, memory_budget="2MiB", seed_chunk_size=None)
    assert not whole.plan(x).fits
    with pytest.raises(errors.OverBudget):
        whole(x)
    mapped = shardmap.jacrev(function, memory_budget="2MiB")
    torch.testing.assert_close(
        mapped(x), loop(torch.func.jacrev(function), x), rtol=1e-3, atol=1e-5
    )
    assert mapped.plan(x).fits
