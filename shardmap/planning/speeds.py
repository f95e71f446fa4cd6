"""Chunk sizes by measured speed: what earlier chunks of a program showed, and what to try next.

The first chunks of a run are probes. A size is measured by a few chunks, its least time counts, and
the search climbs from the estimate to the next power of two that is faster, until both neighbours
of the best size are slower. What was found serves later calls. A call that is too short to try
another size beside its own tries one as a whole, in a later call: its first one runs with the
estimate.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

TELLING = 0.01
"""Seconds spent in chunks above which their measured speed is trusted."""
FIRST = 3
"""Chunks by which a size is measured; the first of them only warms up (memory, kernels chosen by
shape)."""
CLOSE, SURE = 2.0, 6
"""Ratio to the best size's time up to which a size is measured again, and by how many chunks: on a
machine with other work the least of two is not the truth. No more are noted: the least of many is
no fair comparison with the least of few."""
WORTHWHILE = 1.02
"""Ratio of times below which the smaller of two sizes is preferred: it needs less memory."""
PART = 4
"""A run tries another size if that takes less than this part of what is left."""
REACH = 2
"""Most that a size tried in a run exceeds the run's first: the plan's peak covers it."""


class Speed(NamedTuple):
    """Measured speed of chunks of about one size."""

    size: int
    """Samples in the fastest of them."""
    sample_seconds: float
    """Least seconds per sample, without the first chunk's."""
    chunks: int
    """Chunks measured."""


def bucket(size: int) -> int:
    """The power of two that is nearest to a chunk size: sizes that share it count as one."""
    return round(math.log2(size))


@dataclass(slots=True)
class Learned:
    """Measurements of earlier runs of a program on a device.

    Threads share it: `note` holds a lock, and `speeds` is replaced as a whole.
    """

    seconds: float = 0.0
    """Seconds spent in chunks so far."""
    samples: int = 0
    """Samples computed in chunks so far."""
    ceiling: int | None = None
    """Most samples in a chunk, found when memory ran out; None if it never did."""
    scale: float | None = None
    """Measured bytes of a chunk divided by predicted bytes; None before a measurement."""
    speeds: Mapping[int, Speed] = field(default_factory=dict)
    """Measured speeds, by `bucket`, with the number of threads in `threads`."""
    threads: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def sample_seconds(self) -> float | None:
        """Seconds per sample, once chunks have run for long enough to tell."""
        if not self.samples or self.seconds < TELLING:
            return None
        known = [s.sample_seconds for s in self.measured().values() if s.chunks >= FIRST]
        return min(known, default=self.seconds / self.samples)

    def measured(self) -> Mapping[int, Speed]:
        """The speeds that were measured with as many threads as there are now."""
        speeds, threads = self.speeds, self.threads
        return speeds if threads == torch.get_num_threads() else {}

    def note(self, size: int, seconds: float, tried: bool) -> None:
        """Remember the time of a chunk.

        Args:
            size: Its number of samples.
            seconds: The time.
            tried: True if its size was chosen to be measured, and is compared with others.
        """
        with self._lock:
            self.seconds += seconds
            self.samples += size
            if not tried:
                return
            before, key = self.measured(), bucket(size)
            speed = before.get(key)
            if speed is not None and speed.chunks >= SURE:
                return
            found = Speed(size, seconds / size, 1)
            if speed is not None:
                warm = speed.chunks > 1 and speed.sample_seconds <= found.sample_seconds
                found = (speed if warm else found)._replace(chunks=speed.chunks + 1)
            self.speeds = {**before, key: found}
            self.threads = torch.get_num_threads()


def even(samples: int, size: int) -> int:
    """The chunk size that cuts samples into as many chunks as `size` does, of even size."""
    return -(-samples // -(-samples // size)) if samples else size


def sizes_to_try(samples: int, most: int, start: int) -> tuple[int, ...]:
    """The chunk sizes that a run may try, ascending: one near each power of two.

    Chunks of one sample are tried only if the run starts with them, as they need a lowering of
    their own.

    Args:
        samples: Samples of the run.
        most: Most samples in a chunk.
        start: Size of the first chunk.
    """
    least = 1 if start <= 1 else 2
    most = min(most, REACH * start)
    found: dict[int, int] = {bucket(start): start} if least <= start <= most else {}
    for power in range(most.bit_length() + 1):
        size = even(samples, min(1 << power, most))
        if least <= size <= most:
            found.setdefault(bucket(size), size)
    return tuple(sorted(found.values()))


def next_size(
    speeds: Mapping[int, Speed], trials: Sequence[int], start: int, left: int, begins: bool
) -> int:
    """The size of the next chunk: the best one known, or one that is still to be measured.

    The best size and its neighbours are measured in turn, so that a slow moment of the machine does
    not fall on one of them alone.

    Args:
        speeds: Measured speeds.
        trials: The sizes that may be tried, ascending.
        start: The size that the plan begins with.
        left: Samples that are left.
        begins: True at the beginning of a call, when all its chunks may be of a size to be tried.
    """
    counts = {size: _count(speeds, size) for size in trials}
    known = [size for size in trials if counts[size] >= FIRST]
    if start not in counts or not known:
        return start
    best = fastest(speeds, known) if start in known else start
    at = trials.index(best)
    around = [best, *trials[at + 1 : at + 2], *trials[max(0, at - 1) : at]]
    limit = CLOSE * speeds[bucket(best)].sample_seconds if best in known else 0.0
    unsure = [
        size
        for size in around
        if counts[size] < FIRST
        or (counts[size] < SURE and speeds[bucket(size)].sample_seconds <= limit)
    ]
    if unsure == [best]:
        return best
    payable = [size for size in unsure if begins or size <= best or PART * size <= left]
    return min(payable, key=lambda size: counts[size], default=best)


def _count(speeds: Mapping[int, Speed], size: int) -> int:
    speed = speeds.get(bucket(size))
    return 0 if speed is None else speed.chunks


def fastest(speeds: Mapping[int, Speed], known: Sequence[int]) -> int:
    """The smallest of the measured sizes that is nearly as fast as the fastest."""
    limit = WORTHWHILE * min(speeds[bucket(size)].sample_seconds for size in known)
    return next(size for size in known if speeds[bucket(size)].sample_seconds <= limit)


def remembered(speeds: Mapping[int, Speed], most: int, guess: int) -> int | None:
    """The best size of earlier calls that this one may take.

    None if the estimate `guess` has not been measured: it depends on the number of samples.
    """
    if _count(speeds, guess) < FIRST:
        return None
    known = {key: s for key, s in speeds.items() if s.chunks >= FIRST and s.size <= most}
    return fastest(known, sorted(s.size for s in known.values())) if known else None
