"""Forecasts against numbers worked out by hand; sizes are primes, so that no factor can hide."""

from __future__ import annotations

import dataclasses

import pytest

from shardmap.planning.cluster import TASK_BYTES, task_rows
from shardmap.planning.forecast import REQUESTS_PER_SECOND, Workload, forecast

LOAD = Workload(
    samples=10007,
    sample_bytes=13,
    result_bytes=17,
    program_bytes=1009,
    sample_seconds=0.019,
    measured=True,
    chunk_size="auto",
)


def test_results_that_are_gathered_by_hand() -> None:
    found = forecast(LOAD, 7)
    assert (found.task_samples, found.tasks) == (
        179,
        56,
    )  # ceil(10007 / 56); 55 * 179 = 9845 < 10007
    assert found.compute_seconds == pytest.approx(8 * 179 * 0.019)  # 56 tasks, 7 at a time
    assert (found.sent_bytes, found.gathered_bytes, found.program_bytes) == (130091, 170119, 7063)
    assert found.driver_bytes == 307273
    assert found.driver_seconds == pytest.approx(56 * 0.6e-3 + (130091 + 170119 + 1009) * 1e-9)
    assert found.driver_peak_bytes == 170119 + 14 * 179 * (
        13 + 17
    )  # results, and two tasks for each worker
    assert (found.store_requests, found.store_seconds) == (0, 0)
    assert (found.bottleneck, found.seconds) == ("workers", found.compute_seconds)


def test_results_that_workers_write_by_hand() -> None:
    found = forecast(dataclasses.replace(LOAD, sample_bytes=0, unit_rows=101, unit_objects=3), 7)
    assert (found.task_samples, found.tasks) == (101, 100)  # 99 * 101 = 9999 < 10007
    assert found.compute_seconds == pytest.approx(15 * 101 * 0.019)  # ceil(100 / 7) rounds
    assert found.driver_seconds == pytest.approx(100 * 0.8e-3 + 1009 * 1e-9)
    assert found.driver_bytes == found.program_bytes == 7063
    assert found.driver_peak_bytes == 0
    assert (found.store_requests, found.store_seconds) == (400, 400 / REQUESTS_PER_SECOND)


def test_samples_that_travel_cost_the_driver_more_even_if_results_do_not() -> None:
    found = forecast(dataclasses.replace(LOAD, unit_rows=101), 7)
    assert found.driver_seconds == pytest.approx(100 * 0.6e-3 + (130091 + 1009) * 1e-9)
    assert found.driver_peak_bytes == 14 * 101 * 13


def test_reduced_results_come_once_per_task() -> None:
    found = forecast(dataclasses.replace(LOAD, reduced=True), 7)
    assert found.gathered_bytes == 56 * 17
    assert found.driver_peak_bytes == 2 * 17 + 14 * 179 * 13


def test_twice_the_workers_take_half_the_time_until_the_driver_is_the_bottleneck() -> None:
    load = dataclasses.replace(LOAD, samples=1 << 20, chunk_size=64)
    times = {workers: forecast(load, workers) for workers in (1, 2, 4, 8, 8192)}
    for workers in (2, 4, 8):
        assert times[workers].seconds == pytest.approx(times[1].seconds / workers)
        assert times[workers].bottleneck == "workers"
    assert times[8192].bottleneck == "driver"
    assert times[8192].seconds == times[8192].driver_seconds == times[1].driver_seconds
    assert times[8192].sent_bytes == times[1].sent_bytes
    assert times[8192].program_bytes == 8192 * times[1].program_bytes


def test_many_small_units_make_the_store_the_bottleneck() -> None:
    load = dataclasses.replace(
        LOAD, sample_bytes=0, sample_seconds=1e-6, unit_rows=1, unit_objects=29
    )
    found = forecast(load, 1000)
    assert found.bottleneck == "store"
    assert found.seconds == 10007 * 30 / REQUESTS_PER_SECOND


def test_tasks_are_cut_as_the_executor_cuts_them() -> None:
    large = dataclasses.replace(LOAD, sample_bytes=5 << 20, result_bytes=2 << 20)
    for load, row in ((LOAD, 30), (large, 7 << 20), (dataclasses.replace(LOAD, chunk_size=31), 30)):
        assert forecast(load, 11).task_samples == task_rows(10007, 11, row, load.chunk_size)
    assert forecast(large, 11).task_samples * (7 << 20) <= TASK_BYTES


def test_more_workers_than_tasks_is_said() -> None:
    found = forecast(dataclasses.replace(LOAD, chunk_size=5003), 17)
    assert found.tasks == 3
    assert found.program_bytes == 3 * 1009
    assert found.compute_seconds == pytest.approx(5003 * 0.019)
    assert "Only 3 workers have work" in str(found)
    assert "Only" not in str(forecast(LOAD, 7))


def test_an_empty_batch_takes_no_time() -> None:
    for load in (LOAD, dataclasses.replace(LOAD, unit_rows=3)):
        found = forecast(dataclasses.replace(load, samples=0), 7)
        assert (
            found.tasks,
            found.compute_seconds,
            found.driver_peak_bytes,
            found.program_bytes,
        ) == (0, 0, 0, 0)
        assert "predicted time" in str(found)


def test_the_table_marks_guesses_and_names_the_bottleneck() -> None:
    text = """\
7 workers, each like this machine, once they have started: 10007 samples
tasks                     100  of 101 samples
workers busy          ~28.8 s  ~1.9 s for each task
driver busy           60.1 ms  600 us for each task, and 1 ms for each MB
store busy           114.3 ms  3500 requests per second; it has to take 5.8 KiB/s
through the driver  133.9 KiB  samples 127.0 KiB, results 0 B, program and captured tensors 6.9 KiB
driver's memory      18.0 KiB  at most, beside the batch
store requests            400  3 and the manifest's entry for each unit
predicted time        ~28.8 s  the bottleneck: workers"""
    assert (
        str(forecast(dataclasses.replace(LOAD, unit_rows=101, unit_objects=3, measured=False), 7))
        == text
    )
    assert "~" not in str(forecast(LOAD, 7))
