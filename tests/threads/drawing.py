"""Random numbers in several threads: `python -m tests.threads.drawing WHAT`.

What a recording draws comes from generators of its own, so that a thread that draws with torch
meanwhile sees the usual stream, and no number twice.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import shardmap
from shardmap import errors
from tests.threads import process

x = torch.ones(5, 8, dtype=torch.float64)


def noisy(r: Tensor) -> Tensor:
    return torch.nn.functional.dropout(r, 0.5) + torch.randn_like(r) + torch.rand(8)


def beside(work: Callable[[], None], draw: Callable[[], float], least: int) -> list[float]:
    """The values of `draw` in another thread while `work` ran; there are at least `least`."""
    drawn: list[float] = []
    done = threading.Event()

    def loop() -> None:
        while not done.is_set() or len(drawn) < least:
            drawn.append(draw())

    thread = threading.Thread(target=loop)
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(0.005)
    return drawn


def torch_stream() -> None:
    """The draws of both threads together are torch's stream: each number once, in its order."""
    seeds: list[int] = []

    def work() -> None:
        for turn in range(40):
            found = shardmap.vmap(noisy, randomness="different", chunk_size=[None, 2][turn % 2])(x)
            assert found.shape == x.shape
            seeds.append(turn)

    torch.manual_seed(7)
    drawn = beside(work, lambda: float(torch.rand((), dtype=torch.float64)), 200)
    torch.manual_seed(7)
    # a map draws some seeds of 64 bits, each as much of the stream as one float64
    stream = [
        float(torch.rand((), dtype=torch.float64)) for _ in range(len(drawn) + 20 * len(seeds))
    ]
    assert len(set(drawn)) == len(drawn), "a number was drawn twice"
    left = iter(stream)
    assert all(d in left for d in drawn), "the draws are no part of torch's stream in its order"


def same_numbers() -> None:
    """Maps in eight threads, each of which seeds its own call, draw what they draw alone."""
    seeding = threading.Lock()
    faults: list[str] = []

    def call(seed: int) -> Tensor:
        def function(r: Tensor) -> Tensor:
            return noisy(r) + torch.poisson(r * 50) * seed

        with seeding:  # torch's seed belongs to the process: only the drawing of ours is tested
            torch.manual_seed(seed)
            return shardmap.vmap(function, randomness="different", chunk_size=2)(x)

    wanted = {seed: call(seed) for seed in range(8)}

    def work(seed: int) -> None:
        for _ in range(3):
            if not torch.equal(call(seed), wanted[seed]):
                faults.append(f"seed {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults


def accused() -> None:
    """A function that draws nothing is not refused because another thread draws now and then."""
    pause = threading.Event()

    def draw() -> float:
        pause.wait(0.05)
        return random.random() + np.random.rand()

    def work() -> None:
        for turn in range(60):
            k = float(turn)
            torch.testing.assert_close(shardmap.vmap(lambda r, k=k: r * k)(x), x * k)

    beside(work, draw, 5)


def guilty() -> None:
    """A function that does draw with python or numpy is refused, whatever other threads do."""
    for source, f in {
        "random": lambda r: r * random.random(),
        "numpy.random": lambda r: r * np.random.rand(),
    }.items():

        def work(f: Callable[[Tensor], Tensor] = f, source: str = source) -> None:
            with pytest.raises(errors.RandomnessError, match=f"python's {source}"):
                shardmap.vmap(f, randomness="different")(x)

        before = random.getstate()
        work()
        assert random.getstate() == before, "with no other thread the state is restored"
        beside(work, lambda: 0.0, 1)


WHAT = {f.__name__: f for f in (torch_stream, same_numbers, accused, guilty)}

if __name__ == "__main__":
    process.limit()
    torch.set_num_threads(1)
    WHAT[sys.argv[1]]()
    print("right")
