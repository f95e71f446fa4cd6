"""A real Ray of this machine for tests, and looks at its processes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import ray

import shardmap
from shardmap.run import pool

TWO = shardmap.Ray(workers=2)


@contextlib.contextmanager
def local_ray(cpus: int = 2) -> Iterator[None]:
    """A Ray of its own, whatever ran before in this process."""
    if ray.is_initialized():
        pool.release()
        ray.shutdown()
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        yield
    finally:
        pool.release()
        ray.shutdown()


def pids() -> list[int]:
    """The worker processes that have started."""
    assert pool._pool is not None
    return [w.pid for w in pool._pool.workers if w.pid is not None]


def gone(pid: int, seconds: float = 20.0) -> bool:
    """True if a process ends within that time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
