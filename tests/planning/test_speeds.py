"""Chunk sizes that are chosen by measured speed."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardmap.planning.cost import cpu_chunk_seconds
from shardmap.planning.memory import Level, MemoryModel
from shardmap.planning.observe import Kernel, Observation, OpCost
from shardmap.planning.speeds import (
    FIRST,
    SURE,
    Learned,
    bucket,
    even,
    next_size,
    remembered,
    sizes_to_try,
)
from shardmap.planning.split import Site, split
from tests.planning.common import QUICK

SMALL = MemoryModel(0, (Level(0, 1 << 16),))


def observed(*kernels: Kernel) -> Observation:
    costs = [OpCost("op", 1, k.flops, k.bytes, k.fixed_bytes) for k in kernels]
    return Observation((Level(0, 1 << 16),), Level(0, 0), tuple(costs), kernels=kernels)


def site(learned: Learned, seen: Observation, probing: bool = True, **options: int) -> Site:
    return Site("cpu", SMALL, None, learned, False, seen, probing, **options)


LAUNCHES = observed(*[Kernel(1e6, 1e5, 1e6, 1e4)] * 100)
"""A hundred kernels of a megabyte of weights each."""


def run(learned: Learned, samples: int, best: int, seen: Observation = LAUNCHES) -> list[int]:
    """The chunk sizes of one call, where chunks of `best` samples are the fastest."""
    lane = split(samples, [site(learned, seen)], "auto").lanes[0]
    size, left, taken = lane.chunk, samples, []
    while left:
        size = min(size, left)
        distance = abs(bucket(size) - bucket(best))
        learned.note(size, size * 1e-3 * 1.3**distance, size in lane.trials)
        taken.append(size)
        left -= size
        if left:
            size = next_size(learned.measured(), lane.trials, lane.chunk, left, begins=False)
    return taken


@pytest.mark.parametrize("best", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("samples", [97, 256, 10_007])
def test_later_calls_find_the_fastest_size(best: int, samples: int) -> None:
    """Whatever the estimate is, and though short calls try one size each."""
    learned = Learned()
    for _ in range(80):
        run(learned, samples, best)
    last = run(learned, samples, best)
    wanted = min(max(best, 2), samples)
    assert abs(bucket(last[0]) - bucket(wanted)) <= (1 if samples < 4 * best else 0)
    assert len(set(last[:-1])) <= 1, "a size that is found is kept"


def test_the_first_call_of_a_short_map_is_sized_by_the_estimate() -> None:
    lane = split(32, [site(Learned(), LAUNCHES)], "auto").lanes[0]
    assert run(Learned(), 32, best=2)[0] == lane.chunk == lane.estimated


def test_a_map_of_a_moment_is_not_measured() -> None:
    lane = split(32, [site(Learned(), observed(Kernel(1.0, 8.0, 0.0, 1.0)))], "auto").lanes[0]
    assert lane.trials == ()
    assert lane.chunk == lane.estimated


@pytest.mark.parametrize("chunk_size", [5, None])
def test_a_size_that_the_user_gives_is_kept(chunk_size: int | None) -> None:
    lane = split(10_007, [site(Learned(), LAUNCHES)], chunk_size).lanes[0]
    assert (lane.chunk, lane.trials, lane.estimated) == (chunk_size or 10_007, (), None)


def test_chunks_lie_within_the_units_of_a_store() -> None:
    lane = split(10_007, [site(Learned(), LAUNCHES, unit=12)], "auto").lanes[0]
    assert lane.trials
    assert lane.most <= 12


def test_reduced_lanes_take_chunks_of_one_size() -> None:
    lanes = split(10_007, [site(Learned(), LAUNCHES)] * 3, "auto", uniform=True).lanes
    assert len({lane.chunk for lane in lanes}) == 1
    assert all(lane.trials == () for lane in lanes)


@QUICK
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_sizes_to_try_fit_and_are_apart(samples: int, most: int, start: int) -> None:
    most = min(samples, most)
    start = even(samples, min(start, most))
    found = sizes_to_try(samples, most, start)
    assert all(1 <= size <= most for size in found)
    assert list(found) == sorted(found)
    assert len({bucket(size) for size in found}) == len(found)


def test_the_peak_covers_the_sizes_that_a_run_may_try() -> None:
    memory = MemoryModel(0, (Level(0, 1 << 20),))
    budget = memory.peak_bytes(100)
    lane = split(
        10_007, [Site("cpu", memory, budget, Learned(), False, LAUNCHES, probing=True)], "auto"
    ).lanes[0]
    assert lane.trials
    assert lane.peak_bytes == memory.peak_bytes(lane.most) <= budget


def test_a_slow_first_chunk_does_not_count() -> None:
    learned = Learned()
    for seconds in (9.0, 0.08, 0.16):
        learned.note(8, seconds, True)
    (speed,) = learned.measured().values()
    assert (speed.sample_seconds, speed.chunks) == (0.01, FIRST)
    assert remembered(learned.measured(), 100, 8) == 8
    assert remembered(learned.measured(), 100, 64) is None


def test_speeds_are_those_of_the_threads_in_use() -> None:
    learned, threads = Learned(), torch.get_num_threads()
    learned.note(8, 1.0, True)
    try:
        torch.set_num_threads(threads + 1)
        assert not learned.measured()
    finally:
        torch.set_num_threads(threads)
    assert learned.measured()


def test_threads_lose_no_measurement() -> None:
    learned = Learned()
    sizes = [1, 2, 4, 8, 16, 32]

    def note() -> None:
        for _ in range(500):
            for size in sizes:
                learned.note(size, 1e-3, True)

    workers = [threading.Thread(target=note) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert learned.samples == 8 * 500 * sum(sizes)
    assert learned.seconds == pytest.approx(8 * 500 * len(sizes) * 1e-3)
    assert [s.chunks for s in learned.measured().values()] == [SURE] * len(sizes)


def test_weights_and_launches_are_shared_by_larger_chunks() -> None:
    """The estimate per sample falls with the size where a chunk reads weights, and is flat else."""
    sizes = (1, 4, 16, 64)
    shared = cpu_chunk_seconds(LAUNCHES, SMALL, sizes, 1) / sizes
    assert all(a > b for a, b in zip(shared, shared[1:], strict=False))
    weights = observed(Kernel(0.0, 0.0, 8e9, 1e9))
    seconds = cpu_chunk_seconds(weights, SMALL, sizes, 1)
    assert max(seconds) == pytest.approx(min(seconds))


def test_intermediates_that_outgrow_the_cache_cost_more() -> None:
    seen = observed(Kernel(0.0, 1e8, 0.0, 1e9))
    large = MemoryModel(0, (Level(0, 1 << 28),))
    here, there = (float(cpu_chunk_seconds(seen, m, (4,), 1)[0]) for m in (SMALL, large))
    assert 1.2 * here < there
