"""Reduced numbers and their memory do not depend on which lane is faster."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import shardmap
from shardmap.run import lanes, local
from tests import oracle
from tests.reduce.expected import batch_of


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> None:
    """Lanes that take longer than they would, by number."""
    original = lanes.Lane.compute

    def compute(self: Any, ready: Any, chunk: Any) -> Any:
        time.sleep(seconds.get(self.number, 0.0))
        return original(self, ready, chunk)

    monkeypatch.setattr(lanes.Lane, "compute", compute)


@pytest.mark.parametrize("seconds", [{}, {0: 0.003}, {1: 0.003}, {0: 0.001, 2: 0.004}])
@pytest.mark.parametrize("chunk_size", [1, 7])
def test_numbers_do_not_depend_on_which_lane_is_faster(
    seconds: dict[int, float], chunk_size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: float sums depend on their order."""
    batch = batch_of(torch.float32, 101, 3)
    names = ("sum", "mean", (torch.add, None), (torch.matmul, None))

    def function(x: torch.Tensor) -> Any:
        return x.exp(), x.exp(), x.exp(), x.outer(x).exp() / 10

    alone = shardmap.vmap(function, reduce=names, chunk_size=chunk_size)(batch)
    slowed(monkeypatch, seconds)
    got = shardmap.vmap(function, reduce=names, chunk_size=chunk_size, devices=["cpu"] * 3)(batch)
    assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))


def test_uneven_chunk_sizes_do_not_change_the_numbers_between_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = batch_of(torch.float32, 101, 3)
    results = []
    for seconds in ({}, {0: 0.003}, {1: 0.003}):
        with monkeypatch.context() as patched:
            slowed(patched, seconds)
            results.append(shardmap.vmap(torch.exp, reduce="sum", devices=["cpu", "cpu"])(batch))
    assert all(torch.equal(results[0], r) for r in results)


def test_partial_results_that_wait_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that is stuck with the first chunk.

    The others wait for it, and memory does not grow with the batch.
    """
    most = 0
    computed, collected = lanes.Lane.compute, lanes.Lane.collect

    def compute(self: Any, ready: Any, chunk: Any) -> Any:
        nonlocal most
        most = max(most, self.gather.waiting)
        return computed(self, ready, chunk)

    def collect(self: Any, wait: bool) -> Any:
        if not wait and any(flight.chunk.start == 0 for flight in self.flights):
            return []  # a device that has not come to an end
        return collected(self, wait)

    def expects(self: Any, size: int) -> float:
        return (
            1e9 if any(flight.chunk.start == 0 for flight in self.flights) else self.number
        )  # the others are always sooner

    monkeypatch.setattr(lanes.Lane, "compute", compute)
    monkeypatch.setattr(lanes.Lane, "collect", collect)
    monkeypatch.setattr(lanes.Lane, "expects", expects)
    batch = batch_of(torch.float64, 1009, 2)
    got = shardmap.vmap(torch.exp, reduce="sum", chunk_size=1, devices=["cpu", "cpu"])(batch)
    oracle.assert_same(got, batch.exp().sum(0), "sum")
    assert most <= local.AHEAD_PER_LANE * 2 + 2, f"{most} partial results waited"
    assert most >= local.AHEAD_PER_LANE, "the lane was not slow enough for anything to wait"


def test_the_results_of_all_samples_are_never_there_at_once() -> None:
    """The stack would take 101 MiB; the reduction's memory is that of a chunk."""
    batch = torch.ones(101, 1)
    plan = shardmap.plan(lambda x: x.expand(1 << 17) * 2.0, reduce="sum", chunk_size=2)(batch)
    assert plan.lanes[0].peak_bytes < 8 << 20
    oracle.assert_same(plan.run(), torch.full((1 << 17,), 202.0), "sum")
