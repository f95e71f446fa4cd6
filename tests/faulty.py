"""Faults in worker processes, on order.

Ray runs `install` in each of them, and a file says what is to go wrong.

A test writes an order, such as `die mid 3`, into the folder that FAULTS names; the first worker
that comes to unit 3 takes it, once. Each task that is begun adds a line to `computed` there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

from shardmap.errors import StoreError
from shardmap.run import lanes, remote
from shardmap.store import base, elements, memmap, places

FOLDER = "SHARDMAP_TEST_FAULTS"


def order(folder: Path, text: str) -> None:
    """Let something go wrong, as often as there are orders."""
    number = len(list(folder.glob("order-*")))
    (folder / f"order-{number}").write_text(text)


def computed(folder: Path) -> list[int]:
    """The first sample of each task that a worker began, in order."""
    try:
        return sorted(int(line) for line in (folder / "computed").read_text().split())
    except FileNotFoundError:
        return []


def _taken(folder: Path, wanted: str) -> bool:
    """Take an order, if there is one."""
    for path in sorted(folder.glob("order-*")):
        with contextlib.suppress(OSError):
            if path.read_text() == wanted:
                path.rename(path.with_name(f"taken-{path.name}-{os.getpid()}"))
                return True
    return False


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def install() -> None:
    """Watch for orders in this worker process."""
    folder = Path(os.environ[FOLDER])
    compute, write, lane_compute = remote._compute, base.Store.write, lanes.Lane.compute
    as_numpy, write_all, sync = elements.as_numpy, memmap._write_all, places.sync
    armed: dict[str, int] = {}

    def watched_compute(bound: Any, task: remote.Task) -> Any:
        with open(folder / "computed", "a") as log:
            log.write(f"{task.start}\n")
        limit = folder / "address-space"
        if limit.exists():  # what a container's limit does
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(
                resource.RLIMIT_AS, (used + int(limit.read_text()), resource.RLIM_INFINITY)
            )
        try:
            return compute(bound, task)
        finally:
            if limit.exists():
                resource.setrlimit(
                    resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                )

    def watched_write(self: base.Store, unit: int, tensors: Any) -> Any:
        if _taken(folder, f"die before {unit}"):
            _die()
        if _taken(folder, f"die mid {unit}"):
            armed["calls"] = 0
        if _taken(folder, f"disk full {unit}"):
            with self._place.explained(f"writing unit {unit}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if _taken(folder, f"unreachable {unit}"):
            try:
                raise ConnectionError("no route to host")
            except ConnectionError as error:
                raise StoreError(
                    f"{self.url}: writing unit {unit} failed: no route to host"
                ) from error
        receipt = write(self, unit, tensors)
        if _taken(folder, f"die after {unit}"):
            _die()
        return receipt

    def half_then_die(handle: int, data: memoryview, at: int) -> None:
        if armed:
            os.pwrite(handle, data[: len(data) // 2], at)
            _die()
        write_all(handle, data, at)

    def second_then_die(t: Any) -> Any:
        if armed:
            armed["calls"] += 1
            if armed["calls"] == 2:  # zarr has written the first output, and not the second
                _die()
        return as_numpy(t)

    def die_before_it_has_its_name(path: str) -> None:
        if armed and path.endswith(places.TEMPORARY):
            _die()
        sync(path)

    def limited(self: lanes.Lane, ready: Any, chunk: Any) -> Any:
        limit = folder / "largest-chunk"
        if limit.exists() and chunk.size > int(limit.read_text()):  # what the kernel's killer does
            _die()
        return lane_compute(self, ready, chunk)

    remote._compute = watched_compute
    base.Store.write = watched_write
    lanes.Lane.compute = limited
    memmap._write_all, elements.as_numpy, places.sync = (
        half_then_die,
        second_then_die,
        die_before_it_has_its_name,
    )
