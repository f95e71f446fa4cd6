"""Runs that measure chunk sizes: results are those of the loop, whatever sizes are tried."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmap
from shardmap.lower import cache
from shardmap.planning import split
from shardmap.run.base import ChunkDone, listen

N = 1009
torch.manual_seed(0)
INNER, OUTER = torch.randn(64, 64) / 8, torch.randn(64, 64) / 8


@pytest.fixture(autouse=True)
def _measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known from other tests, and a map of a moment is measured as a longer one is."""
    cache.clear()
    monkeypatch.setattr(split, "LONG_SECONDS", 0.0)


def function(x: torch.Tensor) -> torch.Tensor:
    """Several kernels, of which each chunk pays the launches."""
    for _ in range(8):
        x = torch.tanh(INNER @ x + OUTER @ x.cos())
    return x


def drawing(x: torch.Tensor) -> torch.Tensor:
    return function(x) + torch.rand(64)


def batch() -> torch.Tensor:
    return torch.randn(N, 64, generator=torch.Generator().manual_seed(1))


def looped() -> torch.Tensor:
    return torch.stack([function(row) for row in batch()])


def sizes(call: Callable[[], Any]) -> tuple[Any, list[int]]:
    """The result of a call, and the sizes of its chunks."""
    events: list[Any] = []
    with listen(events.append):
        result = call()
    chunks = sorted((e.start, e.stop) for e in events if isinstance(e, ChunkDone))
    assert [a for a, _ in chunks] == [0, *[b for _, b in chunks[:-1]]]
    assert chunks[-1][1] == N
    return result, [b - a for a, b in chunks]


def test_sizes_are_tried_and_every_result_is_the_loops() -> None:
    mapped, x, expected = shardmap.vmap(function, trace="once"), batch(), looped()
    seen: set[int] = set()
    for _ in range(30):
        found, taken = sizes(lambda: mapped(x))
        assert torch.allclose(found, expected, atol=1e-5)
        seen.update(taken)
    assert len(seen) > 1, "several sizes were tried"
    plan = shardmap.plan(function, trace="once")(x)
    assert plan.lanes[0].chunk in taken, "a later plan takes what was found"
    text = plan.explain().replace("\n  ", " ")
    assert f"Chunks on cpu: {plan.lanes[0].chunk} samples by measured speed" in text
    assert all(
        speed.chunks > 1 for speed in plan.lanes[0].speeds if f"{speed.size} samples" in text
    )


def test_a_plan_says_that_nothing_was_measured() -> None:
    plan = shardmap.plan(function)(batch())
    text = plan.explain().replace("\n  ", " ")
    assert f"Chunks on cpu: {plan.lanes[0].estimated} samples by an estimate" in text
    assert "nothing was measured yet" in text
    assert "Chunks on" not in shardmap.plan(function, chunk_size=7)(batch()).explain()


@pytest.mark.parametrize("devices", ["cpu", ["cpu", "cpu"]])
@pytest.mark.parametrize("reduce", [None, "mean", "max"])
def test_lanes_and_reductions(devices: Any, reduce: str | None) -> None:
    mapped = shardmap.vmap(function, trace="once", devices=devices, reduce=reduce)
    x, expected = batch(), looped()
    if reduce is not None:
        expected = expected.mean(0) if reduce == "mean" else expected.amax(0)
    for _ in range(8):
        found, taken = sizes(lambda: mapped(x))
        assert torch.allclose(found, expected, atol=1e-5)
        if reduce is not None and devices != "cpu":
            assert len(set(taken[:-1])) == 1, "lanes take chunks of one size"


def test_stores(tmp_path: Path) -> None:
    x, expected = batch(), looped()
    for k in range(6):
        sink = shardmap.MemmapSink(tmp_path / str(k))
        store = shardmap.vmap(function, out=sink)(x)
        assert torch.allclose(store.read(0, 0, N), expected, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_from_outside(remat: bool) -> None:
    mapped, x = shardmap.vmap(function, trace="once", remat=remat), batch()
    one = x.clone().requires_grad_()
    torch.stack([function(row) for row in one]).square().sum().backward()
    for _ in range(6):
        ours = x.clone().requires_grad_()
        mapped(ours).square().sum().backward()
        assert ours.grad is not None
        assert one.grad is not None
        assert torch.allclose(ours.grad, one.grad, atol=1e-4)


def test_draws_are_those_of_any_chunk_size() -> None:
    x, found = batch(), []
    for chunk_size in (N, 7, *["auto"] * 8):
        torch.manual_seed(3)
        mapped = shardmap.vmap(drawing, randomness="different", chunk_size=chunk_size)
        found.append(mapped(x) - looped())
    assert all(torch.allclose(draws, found[0], atol=1e-5) for draws in found)


def test_deterministic_algorithms_take_the_estimate() -> None:
    """Which depends on no clock: the same call gives the same bits."""
    mapped, x = shardmap.vmap(function, trace="once", reduce="sum"), batch()
    for _ in range(10):
        mapped(x)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [sizes(lambda: mapped(x)) for _ in range(4)]
        lane = shardmap.plan(function, trace="once", reduce="sum")(x).lanes[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert lane.trials == ()
    assert lane.chunk == lane.estimated
    for found, taken in runs:
        assert torch.equal(found, runs[0][0])
        assert taken == runs[0][1]
        assert max(taken) == lane.chunk


def test_sizes_that_are_tried_stay_within_the_budget() -> None:
    x, expected = batch(), looped()
    mapped = shardmap.vmap(function, trace="once", memory_budget="400KiB")
    for _ in range(12):
        lane = shardmap.plan(function, trace="once", memory_budget="400KiB")(x).lanes[0]
        assert lane.fits
        found, taken = sizes(lambda: mapped(x))
        assert torch.allclose(found, expected, atol=1e-5)
        assert lane.memory.peak_bytes(max(taken)) <= 400 << 10


def test_threads_share_what_is_learned() -> None:
    mapped, x, expected = shardmap.vmap(function, trace="once"), batch(), looped()
    mapped(x)
    wrong: list[object] = []

    def call() -> None:
        for _ in range(6):
            try:
                if not torch.allclose(mapped(x), expected, atol=1e-5):
                    wrong.append("values")
            except Exception as error:  # reported by the test's own thread
                wrong.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
