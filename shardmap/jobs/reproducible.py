"""One seed and one thread, so that a run gives the same numbers again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_seed(seed: int) -> Iterator[None]:
    """Seed torch for a run, and restore the caller's random state afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one torch thread, so that sums keep their order on every machine.

    Training steps on small batches gain nothing from more threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
