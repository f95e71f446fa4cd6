"""Batches cut among devices of different speed and memory."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmap.planning.memory import (
    NOTHING,
    Level,
    MemoryModel,
)
from shardmap.planning.observe import Observation, OpCost
from shardmap.planning.refusal import refusal_of
from shardmap.planning.speeds import Learned
from shardmap.planning.split import Site, split
from tests.planning.common import QUICK, counts, models


def site(
    name: str,
    speed: float,
    budget: int | None = None,
    memory: MemoryModel = NOTHING,
    observed: bool = False,
) -> Site:
    """A device of a known speed, in samples per second."""
    seen = (
        Observation((Level(0, 0),), Level(0, 0), (OpCost("aten::add", 1, 1.0, 8.0),))
        if observed
        else None
    )
    return Site(
        name,
        memory,
        budget,
        Learned(seconds=1e9 / speed, samples=10**9),
        whole=False,
        observation=seen,
    )


@QUICK
@given(
    st.integers(0, 10**6),
    st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=9),
    st.sampled_from(["auto", None, 1, 3, 1000, {"cpu": 2}, {"cuda": 5}]),
    st.booleans(),
)
def test_shares_make_up_the_batch(
    samples: int, speeds: list[float], chunk_size: Any, uniform: bool
) -> None:
    """Their sum is the batch, none is negative, and a chunk has a sample at least."""
    cut = split(samples, [site(f"cuda:{i}", s) for i, s in enumerate(speeds)], chunk_size, uniform)
    rows = [lane.rows for lane in cut.lanes]
    assert sum(rows) == samples
    assert min(rows) >= 0
    assert all(lane.chunk >= 1 for lane in cut.lanes)
    assert all(lane.chunks == -(-lane.rows // lane.chunk) for lane in cut.lanes)
    if uniform:
        assert len({lane.chunk for lane in cut.lanes}) == 1
    for row, speed in zip(rows, speeds, strict=True):
        assert abs(row - samples * speed / sum(speeds)) <= len(speeds) + 1e-6 * samples


@pytest.mark.parametrize("samples", [0, 1, 3, 7, 8, 13, 101])
def test_equal_devices_take_equal_shares(samples: int) -> None:
    """To one sample, also where there are fewer samples than devices."""
    rows = [
        lane.rows
        for lane in split(samples, [site(f"cuda:{i}", 5.0) for i in range(8)], "auto").lanes
    ]
    assert sum(rows) == samples
    assert max(rows) - min(rows) <= 1


def test_a_faster_device_takes_more() -> None:
    rows = [
        lane.rows for lane in split(1000, [site("cuda:0", 1.0), site("cuda:1", 9.0)], "auto").lanes
    ]
    assert rows == [100, 900]


def test_sizes_by_device() -> None:
    """A device's own entry, else its kind's, else "auto"."""
    sites = [site(name, 1.0) for name in ("cuda:0", "cuda:1", "cpu")]
    sizes = [lane.chunk for lane in split(300, sites, {"cuda:1": 7, "cuda": 11, "cpu": None}).lanes]
    assert sizes == [11, 7, 100]
    assert [lane.name for lane in split(3, [site("cpu", 1.0)] * 3, None).lanes] == [
        "cpu#1",
        "cpu#2",
        "cpu#3",
    ]


@QUICK
@given(models, st.integers(1, 10**5), counts, st.sampled_from(["cpu", "cuda:0"]), st.integers(1, 3))
def test_auto_chunks_fit_the_budget_or_nothing_does(
    model: MemoryModel, samples: int, budget: int, name: str, devices: int
) -> None:
    cut = split(samples, [site(name, 1e6, budget, model, observed=True)] * devices, "auto")
    for lane in cut.lanes:
        assert lane.fits or lane.chunk == 1 or model.peak_bytes(1) > budget
        assert lane.fits == (lane.rows == 0 or lane.peak_bytes <= budget)
    assert (refusal_of(cut) is None) == cut.fits == all(lane.fits for lane in cut.lanes)


def test_chunks_are_no_larger_than_what_memory_ran_out_with() -> None:
    learned = Learned(seconds=1.0, samples=1000, ceiling=5)
    lane = split(
        100, [Site("cpu", NOTHING, None, learned, whole=False, observation=None)], "auto"
    ).lanes[0]
    assert lane.chunk == 5
