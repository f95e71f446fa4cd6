"""Workers that die while results are written.

Nothing is missing, nothing is there twice, nothing is computed in vain.
"""

from __future__ import annotations

import collections
import logging
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import shardmap
from shardmap import errors
from shardmap.run import driver, pool
from shardmap.run.base import ChunkDone, ChunkRedone, Event, RunFinished, listen
from shardmap.store import Recompute
from tests import faulty
from tests.on_ray import TWO, pids

pytestmark = [pytest.mark.ray, pytest.mark.rotating]

SINKS = {
    "zarr": shardmap.ZarrSink,
    "safetensors": shardmap.SafetensorsSink,
    "memmap": shardmap.MemmapSink,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray whose workers look there for orders."""
    where = tmp_path_factory.mktemp("faults")
    if ray.is_initialized():
        pool.release()
        ray.shutdown()
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    faults = {
        "worker_process_setup_hook": "tests.faulty.install",
        "env_vars": {faulty.FOLDER: str(where), "PYTHONPATH": paths},
    }
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env=faults,
    )
    yield where
    pool.release()
    ray.shutdown()


@pytest.fixture(autouse=True)
def _no_orders(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.outer(x, x.sin()), x.to(torch.bfloat16)


def batch(samples: int = 40, width: int = 50) -> torch.Tensor:
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(samples))


def equal(store: shardmap.Store, x: torch.Tensor) -> None:
    """Assert that the stored rows are those that this process computes alone, to the last bit."""
    want = shardmap.vmap(function, chunk_size=store.header.unit)(x)
    for k, expected in enumerate(want):
        got = store.read(k, 0, len(x))
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    assert store.corrupt() == []


def leftovers(where: Path) -> list[str]:
    return [str(p) for p in where.rglob("*") if ".tmp" in p.name or "partial" in p.name]


@pytest.mark.parametrize("stage", ["before", "mid", "after"])
@pytest.mark.parametrize("kind", SINKS)
def test_a_worker_killed_around_its_write(
    kind: str, stage: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One unit is computed twice, every other once."""
    x, events = batch(), list[Event]()
    faulty.order(folder, f"die {stage} 3")
    with listen(events.append), caplog.at_level(logging.WARNING, "shardmap"):
        store = shardmap.vmap(
            function, devices=TWO, chunk_size=4, out=SINKS[kind](tmp_path / "store")
        )(x)
    equal(store, x)
    assert leftovers(tmp_path) == []
    redone = [(e.start, e.stop) for e in events if isinstance(e, ChunkRedone)]
    assert (12, 16) in redone
    assert len(redone) <= driver.WINDOW
    times = collections.Counter(faulty.computed(folder))
    assert set(times) == set(range(0, 40, 4))
    assert times[12] == 2
    # What was done just before may be lost on its way with the process; nothing else is computed
    # twice.
    assert all(n == 1 or (n == 2 and (start, start + 4) in redone) for start, n in times.items())
    assert all("worker died" in e.reason for e in events if isinstance(e, ChunkRedone))
    (finished,) = [e for e in events if isinstance(e, RunFinished)]
    assert finished.redone == {"worker died": len(redone)}
    assert sorted((e.start, e.stop) for e in events if isinstance(e, ChunkDone)) == [
        (i, i + 4) for i in range(0, 40, 4)
    ]
    assert re.search(r"died with samples \d+ to \d+ and is replaced", caplog.text)


def test_several_workers_die_at_several_units(folder: Path, tmp_path: Path) -> None:
    x = batch(53)
    for text in ("die after 0", "die before 1", "die mid 5", "die after 9", "die mid 13"):
        faulty.order(folder, text)
    store = shardmap.vmap(
        function, devices=TWO, chunk_size=4, out=shardmap.ZarrSink(tmp_path / "store")
    )(x)
    equal(store, x)
    times = collections.Counter(faulty.computed(folder))
    assert all(times[start] >= 2 for start in (0, 4, 20, 36, 52))
    assert sum(times.values()) <= 14 + 5 * driver.WINDOW


def test_a_unit_whose_workers_always_die_is_given_up_and_resumed(
    folder: Path, tmp_path: Path
) -> None:
    """Committed units stay; only the missing ones are computed then."""
    x, sink = batch(), shardmap.ZarrSink(tmp_path / "store")
    for _ in range(20):
        faulty.order(folder, "die before 2")
    with pytest.raises(errors.WorkerError, match=r"failed on a Ray worker.*died \d times"):
        shardmap.vmap(function, devices=TWO, chunk_size=4, out=sink)(x)
    kept = shardmap.open_store(tmp_path / "store")
    done = set(kept.receipts())
    assert 2 not in done
    assert done
    assert faulty.computed(folder).count(8) <= 2 + 2 * driver.RETRIES
    for path in folder.iterdir():
        path.unlink()
    store = shardmap.vmap(function, devices=TWO, chunk_size=4, out=sink, resume=True)(x)
    equal(store, x)
    assert faulty.computed(folder) == [4 * unit for unit in range(10) if unit not in done]


def test_a_full_disk_ends_the_run_at_once_and_is_resumed(folder: Path, tmp_path: Path) -> None:
    x, sink = batch(), shardmap.SafetensorsSink(tmp_path / "store")
    faulty.order(folder, "disk full 4")
    with pytest.raises(
        errors.StoreError,
        match=r"writing unit 4 failed: No space left.*free space there.*\(samples 16 to 19, ray:",
    ):
        shardmap.vmap(function, devices=TWO, chunk_size=4, out=sink)(x)
    assert faulty.computed(folder).count(16) == 1, "a full disk is not tried again"
    store = shardmap.vmap(function, devices=TWO, chunk_size=4, out=sink, resume=True)(x)
    equal(store, x)
    assert leftovers(tmp_path) == []


def test_a_store_that_cannot_be_reached_is_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver, "PATIENCE_SECONDS", 0.1)
    x, events = batch(), list[Event]()
    faulty.order(folder, "unreachable 1")
    faulty.order(folder, "unreachable 1")
    faulty.order(folder, "unreachable 7")
    halved: list[int] = []
    task = driver.Task
    monkeypatch.setattr(
        driver, "Task", lambda *a: halved.extend([a[4]] if a[4] else []) or task(*a)
    )
    with listen(events.append), caplog.at_level(logging.WARNING, "shardmap"):
        store = shardmap.vmap(
            function, devices=TWO, chunk_size=4, out=shardmap.ZarrSink(tmp_path / "store")
        )(x)
    equal(store, x)
    assert {s: n for s, n in collections.Counter(faulty.computed(folder)).items() if n > 1} == {
        4: 3,
        28: 2,
    }
    assert [e.redone for e in events if isinstance(e, RunFinished)] == [{"place not reached": 3}]
    assert caplog.text.count("no route to host") == 3
    assert not halved, "a store that is not reached says nothing about memory"


def test_a_store_that_is_never_reached_is_given_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "PATIENCE_SECONDS", 0.05)
    for _ in range(1 + driver.RETRIES):
        faulty.order(folder, "unreachable 1")
    with pytest.raises(errors.StoreError, match=r"no route to host \(samples 4 to 7"):
        shardmap.vmap(
            function, devices=TWO, chunk_size=4, out=shardmap.ZarrSink(tmp_path / "store")
        )(batch())
    assert faulty.computed(folder).count(4) == 1 + driver.RETRIES


def test_a_corrupt_unit_is_found_and_computed_again(folder: Path, tmp_path: Path) -> None:
    x, sink = batch(), shardmap.MemmapSink(tmp_path / "store")
    store = shardmap.vmap(function, devices=TWO, chunk_size=4, out=sink)(x)
    (path, *_) = [p for p in (tmp_path / "store").rglob("*.npy") if p.stat().st_size > 100_000]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (damaged,) = shardmap.open_store(tmp_path / "store").corrupt()
    store.discard(damaged)
    (folder / "computed").unlink()
    store = shardmap.vmap(function, devices=TWO, chunk_size=4, out=sink, resume=True)(x)
    equal(store, x)
    assert faulty.computed(folder) == [4 * damaged]


def test_a_worker_short_of_memory_halves_its_chunks(folder: Path) -> None:
    """The address space ends while it computes.

    The plan, told of more memory than there is, did not know.
    """
    (folder / "address-space").write_text(str(400 << 20))
    x, events = batch(64, 2000), list[Event]()
    with listen(events.append):
        got = shardmap.vmap(
            lambda v: torch.outer(v, v).cumsum(0).sin().sum(),
            devices=shardmap.Ray(workers=1),
            chunk_size=64,
            memory_budget="64GiB",
        )(x)
    want = torch.stack([torch.outer(v, v).cumsum(0).sin().sum() for v in x])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)
    redone = [e for e in events if isinstance(e, ChunkRedone)]
    assert redone
    assert all("memory" in e.reason for e in redone)
    assert [e.redone for e in events if isinstance(e, RunFinished)] == [
        {"memory ran out in a task": len(redone)}
    ]


def test_workers_killed_for_their_memory_get_smaller_chunks(folder: Path, tmp_path: Path) -> None:
    """The cause of death is unknown: the second time, the chunk is halved, then again."""
    (folder / "largest-chunk").write_text("4")
    x = batch(32, 300)
    store = shardmap.vmap(
        lambda v: torch.outer(v, v), devices=shardmap.Ray(workers=1), chunk_size=16,
        out=shardmap.ZarrSink(tmp_path / "store"), memory_budget="1GiB",
    )(x)  # fmt: skip
    torch.testing.assert_close(store.read(0, 0, 32), torch.einsum("ni,nj->nij", x, x))
    assert collections.Counter(faulty.computed(folder)) == {0: 4, 16: 4}


def test_an_error_of_the_function_is_not_tried_again(folder: Path, tmp_path: Path) -> None:
    table = torch.arange(5.0)
    x = torch.arange(26).view(13, 2) % 5
    x[7] = 9
    with pytest.raises(
        errors.WorkerError,
        match=r"(?s)samples 6 to 8 failed.*, ray:.*out of range.*On the worker:\nTraceback",
    ):
        shardmap.vmap(
            lambda r: table.index_select(0, r),
            devices=TWO, chunk_size=3, out=shardmap.ZarrSink(tmp_path / "store"),
        )(x)  # fmt: skip
    assert faulty.computed(folder).count(6) == 1


def test_a_store_that_workers_do_not_see_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place exists on a worker's own disk, with another run in it."""
    other = shardmap.vmap(function, chunk_size=4, out=shardmap.ZarrSink(tmp_path / "other"))(
        batch(8)
    )
    constants = driver.Constants

    def elsewhere(*args: Any) -> Any:
        store = args[10]
        return constants(*args[:10], type(store)(other.url, store.header), *args[11:])

    monkeypatch.setattr(driver, "Constants", elsewhere)
    with pytest.raises(
        errors.StoreError, match=r"not there on .*a file system that all machines share"
    ):
        shardmap.vmap(
            function, devices=TWO, chunk_size=4, out=shardmap.ZarrSink(tmp_path / "store")
        )(batch())


def test_a_store_in_the_drivers_memory_is_written_there(folder: Path) -> None:
    x = batch(23)
    weight = torch.ones(2)
    store = shardmap.vmap(
        lambda v: (*function(v), weight),
        devices=TWO,
        chunk_size=4,
        out=shardmap.ZarrSink("memory://driver"),
    )(x)
    assert torch.equal(store.read(0, 0, 23), shardmap.vmap(function, chunk_size=4)(x)[0])
    assert torch.equal(store.read(2, 0, 23), torch.ones(23, 2))


def test_outputs_that_no_sample_changes_are_stored_for_each(folder: Path, tmp_path: Path) -> None:
    weight = torch.arange(3.0)
    store = shardmap.vmap(
        lambda v: (v, weight * 2),
        devices=TWO,
        chunk_size=4,
        out=shardmap.ZarrSink(tmp_path / "store"),
    )(batch(13))
    assert torch.equal(store.read(1, 0, 13), (weight * 2).expand(13, 3))


def test_units_are_recomputed_on_the_cluster(folder: Path, tmp_path: Path) -> None:
    x = batch(23)
    shardmap.vmap(function, devices=TWO, chunk_size=4, out=shardmap.ZarrSink(tmp_path / "store"))(x)
    again = shardmap.vmap(
        function, devices=TWO, out=Recompute(str(tmp_path / "store"), units=3, seed=1), resume=True
    )(x)
    assert len(again.comparisons) == 3
    assert all(c.agrees for c in again.comparisons)


def chaos(
    seconds: float, every: float, tmp_path: Path, folder: Path, patient: bool = False
) -> tuple[int, float]:
    """Map over and over, while a worker is killed every so often.

    How many were, and for how long. A patient killer waits until something was computed since the
    last one: on a busy machine a worker takes longer to start than it would live.
    """
    killed: list[int] = []
    computed: list[Event] = []

    def note(event: Event) -> None:
        if isinstance(event, ChunkDone):
            computed.append(event)

    over = threading.Event()

    def kill() -> None:
        seen = -1
        while not over.wait(every):
            if patient and len(computed) <= seen:
                continue
            seen = len(computed)
            if alive := pids():
                pid = random.choice(alive)
                try:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                except ProcessLookupError:
                    continue

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    began, number = time.monotonic(), 0
    try:
        while time.monotonic() - began < seconds or (patient and len(killed) < 2):
            x, events = batch(397, 300), list[Event]()
            with listen(events.append), listen(note):
                store = shardmap.vmap(
                    function,
                    devices=TWO,
                    chunk_size=2,
                    out=shardmap.ZarrSink(tmp_path / f"store {number}"),
                )(x)
            equal(store, x)
            done = sorted(
                i for e in events if isinstance(e, ChunkDone) for i in range(e.start, e.stop)
            )
            assert done == list(range(397)), "each sample once"
            number += 1
    finally:
        over.set()
        thread.join()
    return len(killed), time.monotonic() - began


def test_chaos(folder: Path, tmp_path: Path) -> None:
    kills, _ = chaos(16, 4, tmp_path, folder, patient=True)
    assert kills >= 2


@pytest.mark.slow
def test_chaos_for_a_minute(folder: Path, tmp_path: Path) -> None:
    kills, seconds = chaos(60, 2, tmp_path, folder)
    assert kills >= 0.7 * seconds / 2
