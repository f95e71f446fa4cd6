"""The simulated cluster against closed forms; sizes are primes, so that no term can hide."""

from __future__ import annotations

import dataclasses
import doctest
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmap.errors import OptionError, WorkerError
from shardmap.run import simulate as module
from shardmap.run.simulate import Change, Cluster, Outcome, simulate

ROOT = Path(__file__).parents[2]


def clockwork(workers: int, chunk_seconds: float, **others: float) -> Cluster:
    """Nothing random, and nothing that takes time unless it is said."""
    nothing = {
        "chunk_spread": 0.0,
        "worker_spread": 0.0,
        "travel_seconds": 0.0,
        "driver_seconds": 0.0,
        "start_seconds": 0.0,
    }
    return Cluster(workers, chunk_seconds, **{**nothing, **others})


def fields(outcome: Outcome) -> dict[str, float]:
    """All but the one that is measured."""
    return {
        name: value
        for name, value in dataclasses.asdict(outcome).items()
        if name != "schedule_seconds"
    }


# -- closed forms
# ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 23), st.integers(1, 211), st.integers(1, 3))
@settings(deadline=None)
def test_equal_chunks_take_so_many_rounds(workers: int, chunks: int, window: int):
    outcome = simulate(clockwork(workers, 7, start_seconds=11, window=window), chunks)
    rounds = -(-chunks // workers)
    assert outcome.seconds == 11 + 7 * rounds
    assert outcome.busy == pytest.approx(chunks / (workers * rounds))
    assert (outcome.computed, outcome.redone, outcome.deaths, outcome.driver_busy) == (
        chunks,
        0,
        0,
        0,
    )


def test_travel_is_hidden_behind_the_chunk_before():
    """With a second chunk at hand a worker waits for the first one's journey only.

    Without, for each one's, there and back.
    """
    rounds = -(-101 // 7)
    assert (
        simulate(clockwork(7, 13, travel_seconds=3, window=2), 101).seconds == 3 + 13 * rounds + 3
    )
    assert (
        simulate(clockwork(7, 13, travel_seconds=3, window=1), 101).seconds == (3 + 13 + 3) * rounds
    )


def test_one_worker_at_a_time_waits_for_the_driver_too():
    assert simulate(
        clockwork(1, 13, travel_seconds=3, driver_seconds=4, window=1), 17
    ).seconds == 17 * (2 + 3 + 13 + 3 + 2)


def test_a_driver_that_always_has_work_is_what_the_run_takes():
    """Chunks of no length.

    Each costs the driver two seconds before and two after, one chunk after another.
    """
    outcome = simulate(clockwork(19, 0, start_seconds=5, driver_seconds=4), 211)
    assert outcome.seconds == 5 + 4 * 211
    assert outcome.driver_busy == 1
    assert outcome.busy == 0


@pytest.mark.parametrize(("chunk_seconds", "bound"), [(0.5, "driver"), (8.0, "workers")])
def test_the_slower_of_driver_and_workers_sets_the_pace(chunk_seconds: float, bound: str):
    chunks, workers = 20_011, 499
    outcome = simulate(clockwork(workers, chunk_seconds, driver_seconds=0.004), chunks)
    paces = {"driver": chunks * 0.004, "workers": -(-chunks // workers) * chunk_seconds}
    assert max(paces, key=lambda name: paces[name]) == bound
    assert (
        0.999 * paces[bound] < outcome.seconds < 1.05 * paces[bound]
    )  # a sum of 20,011 rounded numbers is not that product


def test_random_times_have_the_mean_that_was_asked_for():
    outcome = simulate(
        Cluster(
            1,
            2.0,
            chunk_spread=0.5,
            worker_spread=0,
            travel_seconds=0,
            driver_seconds=0,
            start_seconds=0,
        ),
        40_009,
    )
    assert outcome.seconds == pytest.approx(2.0 * 40_009, rel=4 * 0.5 / math.sqrt(40_009))


def test_a_slow_worker_does_less():
    """Chunks go to workers with room, so that the time is that of the sum of all speeds, but for the last chunks."""
    cluster = Cluster(
        53,
        1.0,
        chunk_spread=0,
        worker_spread=0.5,
        travel_seconds=0,
        driver_seconds=0,
        start_seconds=0,
    )
    outcome = simulate(cluster, 53_003)
    assert outcome.busy > 0.99


# -- deaths ------------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 10**6),
    st.integers(1, 13),
    st.integers(0, 97),
    st.floats(5, 200),
    st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_every_chunk_is_computed_once_whatever_dies(
    seed: int, workers: int, chunks: int, lifetime: float, window: int
):
    cluster = Cluster(workers, 1.0, lifetime_seconds=lifetime, window=window, retries=10**6)
    outcome = simulate(cluster, chunks, seed)
    assert outcome.computed == chunks
    assert outcome.redone <= outcome.deaths * window
    assert 0 <= outcome.busy <= 1
    assert 0 <= outcome.driver_busy <= 1
    assert fields(outcome) == fields(simulate(cluster, chunks, seed))


def test_another_seed_is_another_run():
    cluster = Cluster(7, 1.0, lifetime_seconds=100)
    assert fields(simulate(cluster, 211, 1)) != fields(simulate(cluster, 211, 2))


def test_as_many_die_as_their_lifetime_says():
    cluster = Cluster(101, 1.0, lifetime_seconds=500, start_seconds=5)
    outcome = simulate(cluster, 100_003, 3)
    expected = outcome.seconds * 101 / (500 + 5)
    assert abs(outcome.deaths - expected) < 4 * math.sqrt(expected)
    assert outcome.deaths < outcome.redone <= 2 * outcome.deaths


def test_deadly_chunks_kill_so_many_workers():
    """Three deaths of one chunk, halfway through.

    The last time nothing else is left to lose with it.
    """
    cluster = clockwork(1, 10, start_seconds=3, retries=3)
    outcome = simulate(dataclasses.replace(cluster, deadly={0: 3}), 5)
    assert outcome.seconds == 3 * (3 + 5) + 3 + 5 * 10
    assert (outcome.deaths, outcome.redone, outcome.computed) == (3, 5, 5)


def test_a_chunk_that_kills_too_often_ends_the_run():
    cluster = dataclasses.replace(clockwork(5, 10, start_seconds=3), deadly={17: 4})
    with pytest.raises(
        WorkerError, match=r"chunk 17: the worker died 4 times, so it is not tried again"
    ):
        simulate(cluster, 41)
    assert simulate(dataclasses.replace(cluster, retries=4), 41).deaths == 4


# -- who comes and goes ------------------------------------------------------------------------------------------------


def test_workers_that_join_later_take_their_share():
    late = dataclasses.replace(clockwork(1, 10, start_seconds=2), changes=(Change(30, 2),))
    # One worker from 2 on, three from 32 on: it finishes three chunks until then, and 8 are left at 32, or rounds of 3, 3 and 2.
    outcome = simulate(late, 11)
    assert outcome.seconds == 32 + 30
    assert outcome.busy == pytest.approx(110 / (60 + 30 + 30))


def test_workers_that_leave_are_not_replaced():
    # Three until 25, halfway through their third chunks; then the third alone has 7 - 6 chunks of its own, and what the others had.
    fewer = dataclasses.replace(clockwork(3, 10), changes=(Change(25, -2),))
    outcome = simulate(fewer, 13)
    assert outcome.seconds == 10 * (13 - 2 * 2)
    assert (outcome.departures, outcome.deaths, outcome.redone) == (2, 0, 4)


def test_a_worker_that_leaves_before_it_is_ready_never_joins():
    cluster = dataclasses.replace(clockwork(2, 10, start_seconds=5), changes=(Change(1, -1),))
    outcome = simulate(cluster, 3)
    assert (outcome.seconds, outcome.departures, outcome.busy) == (35, 1, 1)


def test_all_have_left():
    cluster = dataclasses.replace(clockwork(3, 10), changes=(Change(25, -7),))
    with pytest.raises(
        WorkerError, match="7 of 13 chunks are left, and no worker: all have left for good"
    ):
        simulate(cluster, 13)
    back = dataclasses.replace(cluster, changes=(*cluster.changes, Change(100, 1)))
    assert simulate(back, 13).seconds == 100 + 7 * 10


@pytest.mark.parametrize(
    ("name", "value"),
    [("workers", -1), ("window", 0), ("retries", -1), ("chunk_seconds", math.nan)],
)
def test_values_out_of_range_are_refused(name: str, value: float):
    with pytest.raises(
        OptionError, match=f"Cluster: {name}={value}; pass a number that is at least"
    ):
        dataclasses.replace(Cluster(2, 1.0), **{name: value})


def test_the_example_runs():
    found = doctest.testmod(module)
    assert (found.failed, found.attempted) == (0, 3)


def test_nothing_to_do():
    assert fields(simulate(Cluster(3, 1.0), 0)) == fields(Outcome(0, 0, 0, 0, 0, 0, 0, 0))


# -- the benchmark -----------------------------------------------------------------------------------------------------


def test_the_benchmark_writes_its_tables(tmp_path: Path):
    small = [
        "--chunks",
        "2003",
        "--schedule-workers",
        "10",
        "1000",
        "--workers",
        "53",
        "--driver-ms",
        "2",
        "--chunk-seconds",
        "0.05",
        "1",
    ]
    words = [
        sys.executable,
        "-m",
        "benchmarks.simulation",
        *small,
        "--no-ray",
        "--output",
        str(tmp_path / "found"),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    results = json.loads((tmp_path / "found.json").read_text())
    assert done.stdout == (tmp_path / "found.md").read_text()
    [row] = results["bottleneck"]
    assert row["runs"][0]["slowdown"] > 1.5 > row["runs"][1]["slowdown"]
    assert row["shortest_seconds"] == pytest.approx(53 * 0.002, rel=0.3)
