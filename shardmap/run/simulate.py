"""Simulate a run on a cluster: the executor's own schedule under a discrete-event clock.

It answers questions that need a large cluster: whether one driver keeps a thousand workers busy,
the cost of worker deaths, the time of a run. Chunks, starts and deaths take random times from a
seeded generator; chunks are assigned by the code that runs on a real cluster
(`shardmap.run.schedule`), and its own time is measured beside the time that the model gives the
driver for each chunk.

The model: the driver does one thing at a time. It sends a chunk, which travels, waits until the
worker has computed what it was sent before, is computed, and travels back; the driver takes the
results in and hands out again. The unfinished chunks of a worker that dies are lost, and
another worker is requested in its place. The network's bandwidth and the store's are not modelled.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from shardmap.errors import OptionError, WorkerError
from shardmap.planning.split import Chunk
from shardmap.run.schedule import Schedule

_DRAWS = 1 << 14
"""Number of random numbers drawn at a time: drawing one by one would dominate the run time."""


@dataclass(frozen=True, slots=True)
class Change:
    """Workers that join a run later, or leave it for good."""

    seconds: float
    """Time of the change, from the begin of the run."""
    workers: int
    """Number of workers that join; if negative, number of workers that leave (the oldest first) and
    are not replaced."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Parameters of the simulated cluster.

    Raises:
        OptionError: A value is out of range.
    """

    workers: int
    """Number of workers requested at the begin."""
    chunk_seconds: float
    """Mean time of a chunk on a worker."""
    chunk_spread: float = 0.2
    """Standard deviation of that time over its mean, from chunk to chunk; starts vary as much."""
    worker_spread: float = 0.2
    """The same, from worker to worker: a slow one is slow with every chunk."""
    travel_seconds: float = 0.005
    """Time that samples take to a worker, and that results take back."""
    start_seconds: float = 5.0
    """Mean time from the request for a worker until it is ready."""
    driver_seconds: float = 0.002
    """Driver time for each chunk, half of it before the chunk is sent, half to take in its
    results."""
    lifetime_seconds: float = math.inf
    """Mean time from a worker's start to its death."""
    deadly: Mapping[int, int] = field(default_factory=dict)
    """For a chunk's number: the number of workers that die in the middle of computing it, one after
    the other."""
    changes: tuple[Change, ...] = ()
    window: int = 2
    """Most chunks that a worker has at a time."""
    retries: int = 3
    """Most times that a chunk is computed again after its worker died."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, least = getattr(self, entry.name), 1 if entry.name == "window" else 0
            if isinstance(value, int | float) and not value >= least:
                raise OptionError(
                    f"Cluster: {entry.name}={value!r}; pass a number that is at least {least}"
                )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a simulated run."""

    seconds: float
    """Simulated time from the request for workers to the last result."""
    computed: int
    """Number of chunks whose results came in: all of them, each once."""
    redone: int
    """Number of chunks handed out again because their worker was gone."""
    deaths: int
    """Number of workers that died."""
    departures: int
    """Number of workers that left for good."""
    busy: float
    """Share of the workers' ready time that produced results."""
    driver_busy: float
    """Share of the time since the first worker was ready in which the driver worked; near 1 it is
    the bottleneck."""
    schedule_seconds: float
    """Real time of the schedule's own code, for each chunk computed."""


def simulate(cluster: Cluster, chunks: int, seed: int = 0) -> Outcome:
    """Run `chunks` chunks on a simulated cluster.

    Args:
        cluster: Its parameters.
        chunks: Number of chunks.
        seed: Seed of the random times: the same one gives the same run.

    Returns:
        The times and counts of the run.

    Raises:
        WorkerError: The workers of one chunk died more often than it is retried, or all have left
            for good before the end.

    Example:
        >>> from shardmap.run.simulate import Cluster, simulate
        >>> still = Cluster(
        ...     3, 10.0, chunk_spread=0, worker_spread=0, travel_seconds=0, driver_seconds=0
        ... )
        >>> simulate(still, 7).seconds  # 5 until workers are ready, and three rounds
        35.0
    """
    return _Run(cluster, chunks, seed).run()


@dataclass(slots=True, eq=False)
class _Worker:
    """One process from its start to its death; its replacement is another object."""

    slowness: float
    """Its time for a chunk divided by the mean."""
    ready: float = math.nan
    """Time at which it became ready."""
    free: float = 0.0
    """Time at which it will have computed all chunks sent to it."""
    gone: bool = False


class _Singles(Sequence[Chunk]):
    """Chunks of one sample, made on access.

    A million of them would take longer to make than to hand out.
    """

    def __init__(self, chunks: int):
        self.chunks = chunks

    def __len__(self) -> int:
        return self.chunks

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.chunks:
            raise IndexError(i)
        return Chunk(i, i + 1)

    def __iter__(self) -> Iterator[Chunk]:
        return (Chunk(i, i + 1) for i in range(self.chunks))


class _Run:
    """One simulated run."""

    def __init__(self, cluster: Cluster, chunks: int, seed: int):
        self.cluster, self.chunks = cluster, chunks
        self.schedule = Schedule(_Singles(chunks), cluster.window, cluster.retries, cluster.workers)
        self.rng = np.random.default_rng(seed)
        self.draws = _factors(self.rng, cluster.chunk_spread)
        self.slowness = _factors(self.rng, cluster.worker_spread)
        self.deadly = dict(cluster.deadly)
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.number = 0
        """Number of events so far: of events at the same time the earlier one comes first."""
        self.clock = 0.0
        self.driver_free = 0.0
        """Time at which the driver will have finished the work it has begun."""
        self.driver_half = cluster.driver_seconds / 2
        self.first_ready = math.nan
        self.present: dict[_Worker, None] = {}
        """Workers that were requested and are not gone."""
        self.sent = self.computed = self.deaths = self.departures = 0
        self.worked = 0.0
        """Worker seconds that produced results."""
        self.there = 0.0
        """Ready seconds of the workers that are gone."""
        self.schedule_seconds = 0.0

    def run(self) -> Outcome:
        for _ in range(self.cluster.workers):
            self._ask(next(self.slowness))
        for change in self.cluster.changes:
            self._at(change.seconds, self._change, change.workers)
        schedule, events = self.schedule, self.events
        while not schedule.finished:
            if not events:
                raise WorkerError(
                    f"{self.chunks - self.computed} of {self.chunks} chunks are left, and no "
                    "worker: all have left for good"
                )
            self.clock, _, happen, arguments = heapq.heappop(events)
            happen(*arguments)
        assert self.computed == self.chunks
        assert self.sent == self.computed + schedule.redone, (
            "a chunk is handed out once more than it was lost"
        )
        end = max(self.clock, self.driver_free)
        there = self.there + sum(
            end - worker.ready for worker in self.present if worker.ready <= end
        )
        driver = (self.sent + self.computed) * self.driver_half
        return Outcome(
            seconds=end,
            computed=self.computed,
            redone=schedule.redone,
            deaths=self.deaths,
            departures=self.departures,
            busy=self.worked / there if there else 0.0,
            driver_busy=driver / (end - self.first_ready) if driver else 0.0,
            schedule_seconds=self.schedule_seconds / max(1, self.computed),
        )

    def _at(self, when: float, happen: Callable[..., None], *arguments: object) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, happen, arguments))

    # -- workers

    def _ask(self, slowness: float) -> None:
        worker = _Worker(slowness)
        self.present[worker] = None
        self._at(self.clock + self.cluster.start_seconds * next(self.draws), self._ready, worker)

    def _ready(self, worker: _Worker) -> None:
        if worker.gone:
            return
        worker.ready = self.clock
        if math.isnan(self.first_ready):
            self.first_ready = self.clock
        if self.cluster.lifetime_seconds < math.inf:
            self._at(
                self.clock + self.rng.exponential(self.cluster.lifetime_seconds),
                self._die,
                worker,
                None,
            )
        began = time.perf_counter()
        self.schedule.join(worker)
        self.schedule_seconds += time.perf_counter() - began
        self._hand_out()

    def _die(self, worker: _Worker, chunk: Chunk | None) -> None:
        """Let a worker die, of age or of a chunk."""
        if worker.gone:
            return
        self.deaths += 1
        if chunk is not None:
            self.deadly[chunk.start] -= 1
        self._lose(worker)
        self._ask(worker.slowness)
        self._hand_out()

    def _change(self, workers: int) -> None:
        for _ in range(workers):
            self._ask(next(self.slowness))
        for worker in list(self.present)[: max(0, -workers)]:
            self.departures += 1
            self._lose(worker)
        self._hand_out()

    def _lose(self, worker: _Worker) -> None:
        worker.gone = True
        del self.present[worker]
        if math.isnan(worker.ready):
            return
        self.there += self.clock - worker.ready
        began = time.perf_counter()
        lost = self.schedule.leave(worker)
        tried = not lost or self.schedule.blame(lost[0])
        self.schedule_seconds += time.perf_counter() - began
        if not tried:
            raise WorkerError(
                f"chunk {lost[0].start}: the worker died {self.schedule.deaths(lost[0])} "
                "times, so it "
                "is not tried again"
            )

    # -- chunks

    def _hand_out(self) -> None:
        began = time.perf_counter()
        given = list(self.schedule.assignments())
        self.schedule_seconds += time.perf_counter() - began
        for worker, chunk in given:
            self._send(worker, chunk)

    def _send(self, worker: Any, chunk: Chunk) -> None:
        cluster = self.cluster
        self.sent += 1
        self.driver_free = max(self.driver_free, self.clock) + self.driver_half
        begin = max(worker.free, self.driver_free + cluster.travel_seconds)
        seconds = cluster.chunk_seconds * worker.slowness * next(self.draws)
        worker.free = begin + seconds
        if self.deadly.get(chunk.start):
            self._at(begin + seconds / 2, self._die, worker, chunk)
        else:
            self._at(worker.free + cluster.travel_seconds, self._done, worker, chunk, seconds)

    def _done(self, worker: _Worker, chunk: Chunk, seconds: float) -> None:
        if worker.gone:
            return
        self.computed += 1
        self.worked += seconds
        self.driver_free = max(self.driver_free, self.clock) + self.driver_half
        began = time.perf_counter()
        self.schedule.done(worker, chunk)
        self.schedule_seconds += time.perf_counter() - began
        self._hand_out()


def _factors(rng: np.random.Generator, spread: float) -> Iterator[float]:
    """Random factors of mean 1 and standard deviation `spread`, above zero: lognormal."""
    sigma = math.sqrt(math.log1p(spread**2))
    while True:
        yield from np.exp(rng.normal(-(sigma**2) / 2, sigma, _DRAWS)).tolist()
