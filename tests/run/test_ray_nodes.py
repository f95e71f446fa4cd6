"""Machines that join and leave, and drivers that are killed, on a cluster of several nodes on this machine."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

import shardmap
from shardmap import errors
from shardmap.run import pool
from shardmap.run.base import ChunkDone, ChunkRedone, Event, RunFinished, listen
from tests import faulty
from tests.on_ray import gone, pids
from tests.run.test_ray_faults import batch, equal, function

pytestmark = [pytest.mark.ray, pytest.mark.rotating]

SMALL = {"object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without room for workers; tests add nodes with one core each."""
    if ray.is_initialized():
        pool.release()
        ray.shutdown()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    yield made
    pool.release()
    ray.shutdown()
    made.shutdown()


def node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=80 << 20)


def join(cluster: Any) -> None:
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)


def test_a_node_is_removed_and_another_one_joins(cluster: Any, tmp_path: Path) -> None:
    """The lost node's undelivered results are computed again, on the other nodes and a new one."""
    first, second = node(cluster), node(cluster)
    join(cluster)
    x, events, changes, at = batch(1000), list[Event](), list[str](), list[int]()

    def change(event: Event) -> None:
        done = [e.device for e in events if isinstance(e, ChunkDone)]
        if not changes and len(set(done)) == 2:
            changes.append("removed")
            at.append(len(done))
            cluster.remove_node(first)
        elif len(changes) == 1 and len(done) == at[0] + 30:
            changes.append("added")
            node(cluster)

    with listen(events.append), listen(change):
        store = shardmap.vmap(
            function,
            devices=shardmap.Ray(num_cpus=1),
            chunk_size=1,
            out=shardmap.ZarrSink(tmp_path / "store"),
        )(x)
    assert changes == ["removed", "added"]
    equal(store, x)
    done = sorted((e.start, e.stop) for e in events if isinstance(e, ChunkDone))
    assert done == [(i, i + 1) for i in range(1000)]
    redone = [e for e in events if isinstance(e, ChunkRedone)]
    assert 1 <= len(redone) <= 2
    assert [e.redone for e in events if isinstance(e, RunFinished)] == [
        {"worker died": len(redone)}
    ]
    del second


def test_a_node_that_joins_is_used(cluster: Any) -> None:
    node(cluster)
    join(cluster)
    x, events, added = batch(9000), list[Event](), list[Any]()

    def slow(v: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(torch.outer(v, v.sin())).abs().sum()

    def change(event: Event) -> None:
        if not added:
            added.append(node(cluster))

    with listen(events.append), listen(change):
        got = shardmap.vmap(slow, devices="ray", chunk_size=10)(x)
    torch.testing.assert_close(got, shardmap.vmap(slow)(x), rtol=1e-3, atol=1e-3)
    assert {e.device for e in events if isinstance(e, ChunkDone)} == {"ray:0", "ray:1"}


def test_sums_that_were_on_a_lost_node_are_computed_again(cluster: Any) -> None:
    first = node(cluster)
    node(cluster)
    join(cluster)
    x, events, removed = batch(512, 400), list[Event](), list[Any]()

    def change(event: Event) -> None:
        done = [e.device for e in events if isinstance(e, ChunkDone)]
        if (
            not removed and len(set(done)) == 2 and len(done) % 8 == 7
        ):  # the last group of eight is not complete
            removed.append(cluster.remove_node(first))

    with listen(events.append), listen(change):
        got = shardmap.vmap(
            lambda v: torch.outer(v, v), devices="ray", chunk_size=2, reduce="mean"
        )(x)
    torch.testing.assert_close(got, x.T @ x / 512)
    assert removed
    assert [e for e in events if isinstance(e, ChunkRedone)]


DRIVER = """
    import os, signal, sys, torch, shardmap
    from tests.run.test_ray_faults import batch, function
    from shardmap.run.base import ChunkDone, listen

    done = []

    def kill(event):
        done.append(event)
        if sys.argv[2] == "die" and sum(isinstance(e, ChunkDone) for e in done) == 17:
            os.kill(os.getpid(), signal.SIGKILL)

    names = ("SHARDMAP_TEST_FAULTS", "PYTHONPATH")
    faults = {"worker_process_setup_hook": "tests.faulty.install", "env_vars": {name: os.environ[name] for name in names}}
    import ray, logging
    ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=faults)
    with listen(kill):
        shardmap.vmap(function, devices="ray", chunk_size=4, out=shardmap.SafetensorsSink(sys.argv[1]), resume=True)(batch(200))
    print(*sorted(e.start for e in done if isinstance(e, ChunkDone)))
"""


def test_a_killed_driver_is_resumed(cluster: Any, tmp_path: Path) -> None:
    """The cluster continues without it; its workers end; what was committed is not computed again."""
    node(cluster)
    node(cluster)
    (tmp_path / "orders").mkdir()
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {
        "RAY_ADDRESS": cluster.address,
        faulty.FOLDER: str(tmp_path / "orders"),
        "PYTHONPATH": paths,
    }

    def drive(what: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path / "store"), what]
        return subprocess.run(
            words, env=env, capture_output=True, text=True, timeout=120, check=False
        )

    killed = drive("die")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = faulty.computed(tmp_path / "orders")
    kept = set(shardmap.open_store(tmp_path / "store").receipts())
    assert len(kept) == 17
    (tmp_path / "orders" / "computed").unlink()
    resumed = drive("live")
    assert resumed.returncode == 0, resumed.stderr
    missing = [4 * unit for unit in range(50) if unit not in kept]
    assert [int(word) for word in resumed.stdout.split()] == missing
    assert faulty.computed(tmp_path / "orders") == missing
    assert set(before) >= {4 * unit for unit in kept}
    assert len(before) <= 17 + 4, "two workers with two tasks each were at work"
    equal(shardmap.open_store(tmp_path / "store"), batch(200))


def test_ctrl_c_leaves_what_is_committed(cluster: Any, tmp_path: Path) -> None:
    node(cluster)
    join(cluster)
    x, sink, events = batch(), shardmap.ZarrSink(tmp_path / "store"), list[Event]()

    def interrupt(event: Event) -> None:
        if isinstance(event, ChunkDone) and len(events) > 4:
            raise KeyboardInterrupt

    with listen(events.append), listen(interrupt), pytest.raises(KeyboardInterrupt):
        shardmap.vmap(function, devices="ray", chunk_size=4, out=sink)(x)
    assert pool._pool is not None
    assert [w.pid for w in pool._pool.workers] == [None]
    kept = len(shardmap.open_store(tmp_path / "store").receipts())
    assert kept >= 1
    events.clear()
    with listen(events.append):
        store = shardmap.vmap(function, devices="ray", chunk_size=4, out=sink, resume=True)(x)
    equal(store, x)
    assert sum(isinstance(e, ChunkDone) for e in events) == 10 - kept


def test_an_address_is_joined_or_refused_in_words(cluster: Any) -> None:
    node(cluster)
    x = batch(7)
    with pytest.raises(
        errors.ClusterError,
        match=r"no Ray cluster can be reached at 127\.0\.0\.1:1 .*ray start --head",
    ):
        shardmap.vmap(function, devices=shardmap.Ray(address="127.0.0.1:1"))(x)
    with pytest.raises(errors.ClusterError, match="Ray Client.*ray job submit"):
        shardmap.vmap(function, devices=shardmap.Ray(address="ray://127.0.0.1:10001"))(x)
    here = shardmap.Ray(address=cluster.address)
    got = shardmap.vmap(function, devices=here)(x)
    assert torch.equal(got[0], shardmap.vmap(function)(x)[0])
    with pytest.raises(
        errors.ClusterError, match=r"joined the cluster at .* already; call ray.shutdown\(\) first"
    ):
        shardmap.vmap(function, devices=shardmap.Ray(address="10.0.0.1:6379"))(x)


def test_the_environment_of_workers(cluster: Any) -> None:
    """Ray's runtime_env reaches them."""
    node(cluster)
    join(cluster)
    for value in ("1", "2"):
        there = shardmap.Ray(workers=1, runtime_env={"env_vars": {"SHARDMAP_TEST_VALUE": value}})
        shardmap.vmap(torch.sin, devices=there)(torch.zeros(3))
        (pid,) = pids()
        assert f"SHARDMAP_TEST_VALUE={value}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    pool.release()
    assert gone(pid)
