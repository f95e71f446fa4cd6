"""Budgets hold, also while planning; refusals name the remedy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.planning import device as device_memory
from shardmap.planning.memory import (
    format_bytes,
    parse_bytes,
)
from shardmap.run import lanes
from tests import oracle
from tests.planning.common import Peak, batch_of

# ----------------------------------------------------------------------------------------------
# budgets


def outer(x: torch.Tensor) -> torch.Tensor:
    return x.outer(x).sin().sum(0)


@pytest.mark.parametrize("budget", ["300KiB", "1MiB", "3MiB", "40MiB"])
@pytest.mark.parametrize("devices", ["cpu", ["cpu", "cpu"]])
def test_chunks_respect_the_budget(budget: str, devices: Any) -> None:
    """Predicted and measured; with more memory, chunks are no smaller."""
    batch = batch_of(101, 100)
    limit = parse_bytes(budget)
    assert limit is not None
    plan = shardmap.plan(outer, memory_budget=budget, devices=devices)(batch)
    assert plan.fits
    for lane in plan.lanes:
        assert lane.budget_bytes == limit
        assert lane.peak_bytes <= limit
    plan.run()
    with Peak() as measured:
        got = plan.run()
    assert measured.peak <= limit + 4096
    oracle.assert_same(got, oracle.loop(outer)(batch), "output")


def test_more_memory_gives_chunks_that_are_no_smaller() -> None:
    batch = batch_of(101, 100)
    sizes = [
        shardmap.plan(outer, memory_budget=b)(batch).lanes[0].chunk
        for b in ("300KiB", "500KiB", "1MiB", "2MiB")
    ]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2


@pytest.mark.parametrize("chunk_size", [50, None])
@pytest.mark.parametrize("size", [100, 400])
def test_a_chunk_over_the_budget_is_refused(
    chunk_size: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vmap and by plan.run(), before anything is computed: with the numbers and the remedy.

    The plan itself is returned, marked.
    """
    computed: list[Any] = []
    monkeypatch.setattr(lanes.Lane, "compute", lambda self, ready, chunk: computed.append(chunk))
    batch = batch_of(101, size)
    budget = 8 * size * size * 8
    options = {"chunk_size": chunk_size, "memory_budget": budget}
    plan = shardmap.plan(outer, **options)(batch)
    assert not plan.fits
    assert "OVER BUDGET" in str(plan)
    assert "over budget" in repr(plan)
    texts = []
    for call in (lambda: shardmap.vmap(outer, **options)(batch), plan.run):
        with pytest.raises(errors.OverBudget) as caught:
            call()
        texts.append(str(caught.value))
        assert isinstance(caught.value, MemoryError)
    assert texts[0].startswith(
        f"shardmap.vmap(outer, in_dims=0): a chunk of {plan.lanes[0].chunk} needs "
    )
    assert texts[1].startswith("shardmap.plan(outer, in_dims=0): ")
    largest = plan.lanes[0].memory.largest_chunk(budget - plan.lanes[0].memory.resident_bytes, 101)
    for text in texts:
        assert f"budget {format_bytes(budget)}" in text
        assert format_bytes(plan.lanes[0].peak_bytes) in text
        assert text.endswith(f"pass chunk_size='auto', or at most {largest}")
    assert 0 < largest < 50
    assert not computed
    monkeypatch.undo()
    assert shardmap.vmap(outer, chunk_size=largest, memory_budget=budget)(batch).shape == (
        101,
        size,
    )
    with pytest.raises(errors.OverBudget):
        shardmap.vmap(outer, chunk_size=largest + 1, memory_budget=budget)(batch)


@pytest.mark.parametrize(
    ("samples", "remedy"),
    [
        (7, r"not even one sample fits: allow more with memory_budget='87\.0 KiB'"),
        (101, r"78\.9 KiB for the results.*; not even one sample fits: allow more"),
    ],
)
def test_not_even_one_sample_within_the_budget(samples: int, remedy: str) -> None:
    """Also where the map is small, and where the results alone are too large."""
    batch = batch_of(samples, 100)
    with pytest.raises(errors.OverBudget, match=remedy):
        shardmap.vmap(outer, memory_budget="20KiB")(batch)


def test_a_result_over_the_budget(tmp_path: Path) -> None:
    """The kept results exceed the budget, not the chunk; both remedies of the message help."""
    batch = batch_of(1009, 100)
    with pytest.raises(
        errors.OverBudget,
        match=r"788\.3 KiB for the results at 800 B a sample, .*: pass out=shardmap\.ZarrSink\(path\)"
        r", which writes them to a store, pass reduce='sum' for example, .* at most 392 samples",
    ):
        shardmap.vmap(outer, memory_budget="400KiB")(batch)
    expected = torch.stack([outer(row) for row in batch])
    reduced = shardmap.vmap(outer, memory_budget="400KiB", reduce="sum")(batch)
    assert torch.allclose(reduced, expected.sum(0))
    sink = shardmap.MemmapSink(tmp_path / "rows")
    store = shardmap.vmap(outer, memory_budget="400KiB", out=sink)(batch)
    assert torch.allclose(store.read(0, 0, 1009), expected)


def test_a_fraction_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is the budget where none is given."""
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: 1_000_000)
    plan = shardmap.plan(outer, memory_fraction=0.5)(batch_of(101, 100))
    assert plan.lanes[0].budget_bytes == 500_000
    assert plan.lanes[0].peak_bytes <= 500_000
    assert math.isfinite(plan.seconds)
