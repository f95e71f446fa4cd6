"""Forecast of a map on a cluster: time, bytes through the driver, requests to the store.

Arithmetic only; nothing is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardmap.planning.cluster import task_rows
from shardmap.planning.memory import format_bytes
from shardmap.planning.table import format_seconds, layout, wrap

TASK_SECONDS = 0.6e-3
"""Driver time for each task whose samples or results pass through it: to cut, hand out and gather.
Measured on two cores (`benchmarks/cluster.py`)."""
STORE_TASK_SECONDS = 0.8e-3
"""Driver time for each task whose worker reads and writes by itself: to hand out, and to commit.
Measured."""
BYTE_SECONDS = 1.0e-9
"""Driver time for each byte that passes through it, 1 ms per MB: into and out of Ray's object
store. Measured."""
WINDOW = 2
"""Tasks that a worker has at a time: one that it computes, one whose samples travel meanwhile."""
REQUESTS_PER_SECOND = 3500
"""Writes per second that an object store takes under one prefix: what Amazon S3 documents (PUT,
COPY, POST, DELETE)."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A map, as far as a forecast depends on it."""

    samples: int
    """N, the size of the batch."""
    sample_bytes: int
    """Bytes of one sample sent from the driver to a worker; 0 where workers read samples
    themselves."""
    result_bytes: int
    """Bytes of one sample's results."""
    program_bytes: int
    """Bytes of the recorded program and the tensors that it captures, which each worker gets
    once."""
    sample_seconds: float
    """Seconds that one worker computes for one sample."""
    measured: bool
    """True if `sample_seconds` was measured; otherwise it is a guess from operations and bytes."""
    chunk_size: Any = "auto"
    """The user's option."""
    reduced: bool = False
    """True if each task brings one partial result instead of a row per sample."""
    unit_rows: int | None = None
    """Samples per unit of the store that workers write to; None where results are gathered."""
    unit_objects: int = 1
    """Files or objects in a unit, without its entry in the manifest."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted time and traffic of a map with a number of workers that have started."""

    workload: Workload
    workers: int
    task_samples: int
    """Samples in each task but the last."""
    tasks: int
    compute_seconds: float
    """Seconds until the last worker is done, if nothing kept them waiting."""
    driver_seconds: float
    """Seconds that the driver is busy."""
    store_seconds: float
    """Seconds that the store needs for its requests; 0 without a store."""
    sent_bytes: int
    """Bytes of samples sent from the driver to workers."""
    gathered_bytes: int
    """Bytes of results sent from workers to the driver."""
    program_bytes: int
    """Bytes of program and captured tensors sent to all workers that have work."""
    driver_peak_bytes: int
    """Most bytes on the driver's machine beside the batch: results, and samples of unfinished
    tasks."""
    store_requests: int
    """Number of objects written: for each unit its files and its entry in the manifest."""

    @property
    def seconds(self) -> float:
        """Predicted seconds for the run.

        Workers, driver and store work side by side, so the slowest of them counts.
        """
        return max(self.compute_seconds, self.driver_seconds, self.store_seconds)

    @property
    def bottleneck(self) -> str:
        """The slowest of the three: "workers", "driver" or "store"."""
        named = {
            "workers": self.compute_seconds,
            "driver": self.driver_seconds,
            "store": self.store_seconds,
        }
        return max(named, key=lambda name: named[name])

    @property
    def driver_bytes(self) -> int:
        """Bytes that pass through the driver."""
        return self.sent_bytes + self.gathered_bytes + self.program_bytes

    def __str__(self) -> str:
        load, guess = self.workload, "" if self.workload.measured else "~"
        each = format_seconds(self.task_samples * load.sample_seconds)
        per_task = format_seconds(_task_seconds(load))
        rows = [
            ("tasks", str(self.tasks), f"of {self.task_samples} samples"),
            (
                "workers busy",
                guess + format_seconds(self.compute_seconds),
                f"{guess}{each} for each task",
            ),
            (
                "driver busy",
                format_seconds(self.driver_seconds),
                f"{per_task} for each task, and 1 ms for each MB",
            ),
        ]
        if load.unit_rows is not None:
            rate = (
                format_bytes(load.samples * load.result_bytes / self.seconds)
                if self.seconds
                else "0 B"
            )
            rows.append(
                (
                    "store busy",
                    format_seconds(self.store_seconds),
                    f"{REQUESTS_PER_SECOND} requests per second; it has to take {rate}/s",
                )
            )
        sent, gathered = format_bytes(self.sent_bytes), format_bytes(self.gathered_bytes)
        through = f"samples {sent}, results {gathered}, program and captured tensors"
        rows += [
            (
                "through the driver",
                format_bytes(self.driver_bytes),
                f"{through} {format_bytes(self.program_bytes)}",
            ),
            ("driver's memory", format_bytes(self.driver_peak_bytes), "at most, beside the batch"),
        ]
        if load.unit_rows is not None:
            rows.append(
                (
                    "store requests",
                    str(self.store_requests),
                    f"{load.unit_objects} and the manifest's entry for each unit",
                )
            )
        rows.append(
            (
                "predicted time",
                guess + format_seconds(self.seconds),
                f"the bottleneck: {self.bottleneck}",
            )
        )
        lines = [
            f"{self.workers} workers, each like this machine, once they have started: "
            f"{load.samples} samples",
            layout(rows, left=(0, 2)),
        ]
        if self.tasks < self.workers:
            lines.append(
                wrap(
                    f"Only {self.tasks} workers have work: give a smaller chunk_size, or fewer "
                    "workers."
                )
            )
        return "\n".join(lines)


def forecast(workload: Workload, workers: int) -> Forecast:
    """Predict time, driver traffic and store requests of a map on a cluster.

    Args:
        workload: The map.
        workers: Number of workers, each with the speed of `workload.sample_seconds`.
    """
    samples, gathers = workload.samples, workload.unit_rows is None
    row = workload.sample_bytes + (workload.result_bytes if gathers and not workload.reduced else 0)
    size = workload.unit_rows or task_rows(samples, workers, row, workload.chunk_size)
    size = max(1, min(size, samples))
    tasks = -(-samples // size)
    rounds = -(-tasks // workers)
    sent = samples * workload.sample_bytes
    results = workload.result_bytes * (0 if not gathers else tasks if workload.reduced else samples)
    kept = workload.result_bytes * (0 if not gathers else 2 if workload.reduced else samples)
    requests = 0 if gathers else tasks * (workload.unit_objects + 1)
    return Forecast(
        workload,
        workers,
        size,
        tasks,
        compute_seconds=rounds * size * workload.sample_seconds,
        driver_seconds=tasks * _task_seconds(workload)
        + (sent + results + workload.program_bytes) * BYTE_SECONDS,
        store_seconds=requests / REQUESTS_PER_SECOND,
        sent_bytes=sent,
        gathered_bytes=results,
        program_bytes=workload.program_bytes * min(workers, tasks),
        driver_peak_bytes=kept + min(tasks, WINDOW * workers) * size * row,
        store_requests=requests,
    )


def _task_seconds(workload: Workload) -> float:
    """Seconds of the driver for one task."""
    return (
        TASK_SECONDS if workload.sample_bytes or workload.unit_rows is None else STORE_TASK_SECONDS
    )
