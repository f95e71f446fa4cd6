"""Many new programs from many threads.

Run as `python -m tests.threads.stress KIND THREADS PROGRAMS INTERVAL`.

Every thread maps functions that are new to the process, and compares with the loop.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import shardmap
from tests.threads import process


def function(number: int) -> Callable[[Tensor], Tensor]:
    """A function that differs from all others: in its operators, its constants or its shapes."""
    power, width = number % 3 + 1, number % 7 + 1
    steps = [torch.sin, torch.tanh, torch.cos, lambda t: t * (number + 0.5), torch.relu]
    chosen = [steps[number // 5**k % 5] for k in range(4)]
    weight = torch.linspace(-1, 1, 4 * width, dtype=torch.float64).view(4, width)

    def plain(r: Tensor) -> Tensor:
        h = r @ weight + number
        for step in chosen:
            h = step(h)
        return h**power

    if number % 4 == 1:
        return torch.func.grad(lambda r: plain(r).sum())
    if number % 4 == 2:

        def with_autograd(r: Tensor) -> Tensor:
            y = r.detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(plain(y).sum(), y)[0]

        return with_autograd
    return plain


def mapped(kind: str, f: Callable[[Tensor], Tensor], batch: Tensor, folder: str) -> Tensor:
    if kind == "plain":
        return shardmap.vmap(f)(batch)
    if kind == "reduce":
        return shardmap.vmap(f, reduce="sum", chunk_size=2)(batch)
    if kind == "once":
        again = shardmap.vmap(f, trace="once")
        again(batch)
        return again(batch)
    sink = shardmap.MemmapSink(Path(tempfile.mkdtemp(dir=folder)) / "store")
    return shardmap.vmap(f, out=sink, chunk_size=2)(batch).read(0, 0, len(batch))


def main(kind: str, threads: int, programs: int, interval: float) -> None:
    process.limit()
    torch.set_num_threads(1)
    faults: list[str] = []
    begin = threading.Barrier(threads)
    with tempfile.TemporaryDirectory() as folder:

        def work(thread: int) -> None:
            batch = torch.randn(
                5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(thread)
            )
            begin.wait()
            for turn in range(programs):
                # half of the programs are met by all threads at once
                number = turn if turn % 2 else thread * programs + turn
                f = function(number)
                want = torch.stack([f(r) for r in batch])
                try:
                    found = mapped(kind, f, batch, folder)
                    want = want.sum(0) if kind == "reduce" else want
                    torch.testing.assert_close(found, want)
                except BaseException:
                    faults.append(f"program {number}: {traceback.format_exc()}")

        pool = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        sys.setswitchinterval(interval)
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        sys.setswitchinterval(0.005)
    if faults:
        print(f"{len(faults)} of {threads * programs} are wrong; the first:")
        raise SystemExit("\n\n".join(faults[:3]))
    print(f"{threads * programs} maps")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
