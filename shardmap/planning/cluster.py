"""Cut a batch into tasks for the workers of a cluster."""

from __future__ import annotations

from typing import Any

TASKS_PER_WORKER = 8
"""Tasks for each worker with chunk_size "auto" or None. More would even out workers of different
speed better; fewer would batch better. By simulation, of 60 seconds of work for each of eight
workers whose speed varies by a fifth: 77 s with four, 68 s with eight."""

TASK_BYTES = 64 << 20
"""Most bytes of samples and results that one task moves: a driver holds a few tasks at a time,
whatever the size of the batch."""


def task_rows(samples: int, workers: int, row_bytes: int, chunk_size: Any) -> int:
    """Samples per task: the user's chunks, or about eight tasks per worker, of at most 64 MiB.

    A worker cuts its task again to fit into its own memory.

    Args:
        samples: N, the size of the batch.
        workers: Number of workers.
        row_bytes: Bytes of one sample and its results that pass through the driver.
        chunk_size: The user's option.
    """
    if isinstance(chunk_size, int):
        return chunk_size
    even = -(-samples // (TASKS_PER_WORKER * workers))
    return max(1, min(even, TASK_BYTES // max(1, row_bytes)))
