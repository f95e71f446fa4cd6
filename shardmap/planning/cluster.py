"""How a batch is cut into tasks for the workers of a cluster."""

from __future__ import annotations

from typing import Any

TASKS_PER_WORKER = 8
"""With chunk_size "auto" or None. More would even out workers of different speed better; fewer
would batch better. By simulation, of 60 seconds of work for each of eight workers whose speed
varies by a fifth: 77 s with four, 68 s with eight."""

TASK_BYTES = 64 << 20
"""Of samples and results that one task moves at most: a driver holds a few of them at a time,
whatever the size of the batch."""


def task_rows(samples: int, workers: int, row_bytes: int, chunk_size: Any) -> int:
    """Samples per task: the user's chunks, or about eight tasks per worker, of at most 64 MiB.

    A worker cuts its task again where its memory asks for it.

    Args:
        samples: N, the size of the batch.
        workers: How many there are.
        row_bytes: Of one sample and its results, as far as they travel.
        chunk_size: As the user gave it.
    """
    if isinstance(chunk_size, int):
        return chunk_size
    even = -(-samples // (TASKS_PER_WORKER * workers))
    return max(1, min(even, TASK_BYTES // max(1, row_bytes)))
