"""Children that map after their parent has: `python -m tests.threads.forked HOW`.

The parent maps in other threads all the while, so that the children are forked while locks are
held.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import shardmap
from tests.threads import process

x = torch.arange(12.0, dtype=torch.float64).view(3, 4) / 7
known = shardmap.vmap(lambda r: r.sin(), trace="once")


def check(number: float) -> None:
    """A map that both processes know, one of a new program, and one in chunks and reduced."""
    torch.testing.assert_close(known(x), x.sin())
    torch.testing.assert_close(shardmap.vmap(lambda r: (r * number).cos())(x), (x * number).cos())
    summed = shardmap.vmap(lambda r: (r + number).tanh(), reduce="sum", chunk_size=2)
    torch.testing.assert_close(summed(x), (x + number).tanh().sum(0))


def by_fork() -> None:
    for turn in range(20):
        child = os.fork()
        if not child:
            code = 1
            try:
                check(turn + 0.25)
                code = 0
            finally:
                os._exit(code)
        until = time.monotonic() + 30
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > until:
                os.kill(child, signal.SIGUSR1)  # shows where
                time.sleep(1)
                os.kill(child, 9)
                raise AssertionError(f"child {turn} hangs")
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(status) == 0, f"child {turn}: {status}"


def by_multiprocessing() -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map_async(check, [n + 0.75 for n in range(12)]).get(60)


class Rows(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        check(i + 0.125)
        return shardmap.vmap(lambda r: r * i)(x)


def by_loader() -> None:
    loader = DataLoader(Rows(), 2, num_workers=2, multiprocessing_context="fork", timeout=60)
    for number, rows in enumerate(loader):
        wanted = torch.stack([x * (2 * number), x * (2 * number + 1)])
        torch.testing.assert_close(rows, wanted)


HOW: dict[str, Callable[[], None]] = {
    "fork": by_fork,
    "multiprocessing": by_multiprocessing,
    "loader": by_loader,
}


def main(how: str) -> None:
    process.limit()
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    check(0.5)
    over = threading.Event()

    def busy(thread: int) -> None:
        turn = 0.0
        while not over.is_set():
            turn += 1
            f = thread + turn / 1024
            torch.testing.assert_close(
                shardmap.vmap(lambda r, f=f: (r * f).cos())(x), (x * f).cos()
            )

    threads = [threading.Thread(target=busy, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    HOW[how]()
    over.set()
    for thread in threads:
        thread.join()
    print("right")


if __name__ == "__main__":
    main(sys.argv[1])
