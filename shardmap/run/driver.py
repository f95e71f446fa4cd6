"""The driver's side of a map on a Ray cluster.

It hands out tasks, takes in their results, and replaces workers that die.

A task is a run of consecutive samples. Workers return results to gather, sums to add up, or
receipts for rows that they have written to a store. The driver holds a few tasks at a time,
whatever the size of the batch.
"""

from __future__ import annotations

import collections
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardmap import errors
from shardmap.lower.cache import Lowered
from shardmap.planning.device import Budget
from shardmap.planning.split import Chunk
from shardmap.run.base import ChunkDone, ChunkRedone, Job, RunFinished, RunStarted, emit
from shardmap.run.combine import Combiner
from shardmap.run.messages import HOST, Constants, Done, Failure, Settings, Task
from shardmap.run.packing import pack, unpack
from shardmap.run.pool import Pool, RayWorker, lost_errors
from shardmap.run.prepare import Devices
from shardmap.run.schedule import RETRIES, Schedule
from shardmap.run.startup import Startup
from shardmap.run.worker_io import Arrivals, combined_here, on_worker, read_there
from shardmap.store import Store

logger = logging.getLogger("shardmap")

WINDOW = 2
"""Tasks handed to a worker at a time: one that it computes, and one whose samples travel
meanwhile."""

PATIENCE_SECONDS = 1.0
"""Delay before a store that could not be reached is tried again; it doubles with each attempt."""

_WAIT_SECONDS = 30.0
_GROW_SECONDS = 2.0


@dataclass(slots=True)
class _Flight:
    """A task that a worker has and has not returned."""

    worker: RayWorker
    chunk: Chunk
    apart: Any = None
    """Reference of the reduced outputs, if workers combine them."""


class Driver:
    """One mapped call on the pool.

    It hands out tasks, gathers results in any order, and replaces workers that die.
    """

    def __init__(
        self,
        pool: Pool,
        job: Job,
        chunks: Sequence[Chunk],
        chunk_size: Any,
        budget: Budget,
        store: Store | None,
    ):
        self.pool, self.ray, self.job, self.store = pool, pool.ray, job, store
        self.workers = sorted(pool.workers, key=lambda w: not w.ready)[: max(1, len(chunks))]
        self.tasks = len(chunks)
        self.key = uuid.uuid4().hex
        # Refusals, warnings and fixes of the lowering come from this trial in the driver.
        low = Devices(job).on(str(job.home), job.samples > 1).low
        self.digest, self.text = pool.text(job.recording.program)
        self.read_there = read_there(job)
        self.outputs = tuple([on_worker(o, stored=store is not None) for o in job.outputs])
        self.constants = self.ray.put(self._constants(low, chunk_size, budget))
        self.gather = Arrivals(job)
        self.schedule = Schedule(chunks, WINDOW, RETRIES, expected=len(self.workers))
        self.flying: dict[Any, _Flight] = {}
        self.later: list[tuple[float, RayWorker, Chunk]] = []
        """Tasks that are tried again: the time of the next attempt, the worker, the task."""
        self.redone: collections.Counter[str] = collections.Counter()
        self.halvings = 0
        self.crowds = pool.crowds()
        self.killed: collections.Counter[Chunk] = collections.Counter()
        """Number of workers that died of each task without a stated cause: it may have been
        memory."""
        self.every = any(combined_here(o) and not o.mapped for o in job.outputs)
        """True if each task must return the outputs that do not depend on the sample: a
        user-defined reduction counts them once per sample."""
        self.combiner = Combiner(self.ray, job.call, chunks, self.outputs, self.gather)
        program = self.key, self.digest, self.text, self.constants
        self.startup = Startup(self.ray, job.call, self.workers, program)
        self.grown = time.perf_counter()

    def _constants(self, low: Lowered, chunk_size: Any, budget: Budget) -> Constants:
        job, recording = self.job, self.job.recording
        captured = tuple([pack(t) for t in recording.captured])
        literals = tuple([(pack(t), t.device == job.home) for t in recording.literals])
        columns = {i: job.columns[i] for i in self.read_there}
        store = (
            self.store if self.store is not None and self.store.travels else None
        )  # otherwise workers return results and the driver writes them
        return Constants(
            low.options, captured, literals, recording.scalars, job.seed, recording.sources,
            Settings.current(), self.outputs, budget, columns, store, chunk_size, low.fixes,
            job.compile, job.cuda_graphs,
        )  # fmt: skip

    def run(self) -> list[torch.Tensor]:
        """Run the call from the first task to the last, and return its outputs."""
        started = time.perf_counter()
        emit(RunStarted(self.job.samples, self.tasks, tuple([w.name for w in self.workers])))
        try:
            while self.combiner.left or not self.schedule.finished:
                self._hand_out()
                self._wait()
            result = self._finish()
        except BaseException as error:
            # A task that runs cannot be interrupted, and would delay the next call: the worker
            # is ended. After Ctrl-C all are ended.
            interrupted = not isinstance(error, Exception)
            busy = {id(flight.worker) for flight in self.flying.values()}
            for worker in self.workers:
                if interrupted or id(worker) in busy:
                    worker.stop(self.ray)
            raise
        seconds = time.perf_counter() - started
        causes = ", ".join(f"{cause}: {count}" for cause, count in self.redone.items())
        again = f"; handed out again {sum(self.redone.values())} ({causes})" if causes else ""
        logger.info(
            "%s: %d tasks on %d workers in %.1f s%s",
            self.job.call,
            self.tasks,
            len(self.workers),
            seconds,
            again,
        )
        emit(RunFinished(seconds, dict(self.redone)))
        return result

    def _finish(self) -> list[torch.Tensor]:
        for worker in self.workers:
            if worker.ready:
                worker.actor.forget.remote()
        if self.store is not None:
            self.store.finish()
            return []
        return self.gather.finish()

    # -- handing out

    def _hand_out(self) -> None:
        now = time.perf_counter()
        due = [item for item in self.later if item[0] <= now]
        for item in due:
            self.later.remove(item)
            self.schedule.again(item[1], item[2])
        for worker, chunk in self.schedule.assignments():
            assert isinstance(worker, RayWorker)
            self._submit(worker, chunk)
        self.combiner.hand_out(self.schedule.workers)
        if now - self.grown > _GROW_SECONDS:
            self.grown = now
            if self.schedule.waiting:
                fresh = self.pool.grow()
                self.workers += fresh
                for worker in fresh:
                    self.startup.add(worker)

    def _submit(self, worker: RayWorker, chunk: Chunk) -> None:
        inputs = tuple([None if t is None else pack(t) for t in self._rows(chunk)])
        unmapped = self.every or chunk.start == 0
        halvings = self.halvings + max(0, self.killed[chunk] - 1)
        numbers = self.job.numbers
        task = Task(
            chunk.start,
            chunk.size,
            inputs,
            unmapped,
            halvings,
            self.pool.peers(worker, self.crowds),
            None if numbers is None else numbers[chunk.start : chunk.stop],
        )
        arguments = (self.key, self.digest, self.text, self.constants, task)
        if self.combiner.used:
            ref, apart = worker.actor.task_apart.options(num_returns=2).remote(*arguments)
            self.flying[ref] = _Flight(worker, chunk, apart)
        else:
            self.flying[worker.actor.task.remote(*arguments)] = _Flight(worker, chunk)

    def _rows(self, chunk: Chunk) -> Iterator[torch.Tensor | None]:
        """A task's samples of each input; None where the worker reads them."""
        for i, t in enumerate(self.job.inputs):
            if i in self.read_there:
                yield None
            elif i in self.job.columns:
                yield self.job.columns[i].rows_between(chunk.start, chunk.stop)
            else:
                yield t[chunk.start : chunk.stop]

    # -- results

    def _wait(self) -> None:
        starting = self.startup.pending()
        combining = self.combiner.flying
        refs = [*self.flying, *combining, *starting]
        timeout = _GROW_SECONDS if self.pool.options.workers is None else _WAIT_SECONDS
        if self.later:
            timeout = min(
                timeout, max(0.0, min(item[0] for item in self.later) - time.perf_counter())
            )
        if not refs:  # all remaining tasks wait for another attempt to reach a store
            assert self.later
            time.sleep(timeout)
            return
        done, _ = self.ray.wait(refs, num_returns=1, timeout=timeout)
        if done and len(refs) > 1:
            # Each call looks at every reference: take all that are ready.
            done, _ = self.ray.wait(refs, num_returns=len(refs), timeout=0)
        if not done and timeout == _WAIT_SECONDS and not self.flying and not combining:
            text = (
                "%s: no Ray worker has started yet; the cluster may have no free slot, or "
                "importing torch takes long"
            )
            logger.warning(text, self.job.call)
        for ref in done:
            if ref in starting:
                worker = starting[ref]
                if self.startup.answered(worker, ref):
                    self.schedule.join(worker)
                self.crowds = self.pool.crowds()
            elif ref in combining:
                self._combined(ref)
            else:
                self._finished(ref)

    def _finished(self, ref: Any) -> None:
        flight = self.flying.get(ref)
        if flight is None:
            return  # handed out again together with another task of a worker that died
        worker, chunk = flight.worker, flight.chunk
        exceptions = self.ray.exceptions
        try:
            outcome = self.ray.get(ref)
        except lost_errors(self.ray) as error:
            cause = "memory ran out" if _of_memory(exceptions, error) else "worker died"
            self._lost(worker, cause, str(error))
            return
        except exceptions.RayError as error:
            raise errors.WorkerError(f"{self._where(worker, chunk)}: {error}") from error
        if isinstance(outcome, Failure):
            self._failed(ref, worker, chunk, outcome)
            return
        del self.flying[ref]
        self._take(chunk, outcome)
        self.schedule.done(worker, chunk)
        if flight.apart is not None:
            self.combiner.add(chunk, flight.apart)
        for event in outcome.redone:  # its times are of another machine's clock
            self.redone["memory ran out in a task"] += 1
            emit(ChunkRedone(worker.name, event.start, event.stop, event.reason))
            logger.warning(
                "%s: samples %d to %d on %s: %s",
                self.job.call,
                event.start,
                event.stop - 1,
                worker.place,
                event.reason,
            )
        emit(ChunkDone(worker.name, chunk.start, chunk.stop, outcome.seconds))

    def _take(self, chunk: Chunk, outcome: Done) -> None:
        if self.store is not None:
            if outcome.receipt is not None:
                self.store.commit(outcome.receipt)
            else:
                rows = [unpack(p, HOST) for p in outcome.outputs if p is not None]
                self.store.commit(self.store.write(chunk.start // self.store.header.unit, rows))
            return
        # Results lie read-only in Ray's object store. Chunks are copied into the output; what
        # becomes an output itself is cloned.
        whole = chunk.size == self.job.samples
        outs: list[torch.Tensor | None] = []
        for k, (packed, out) in enumerate(zip(outcome.outputs, self.job.outputs, strict=True)):
            t = None if packed is None else unpack(packed, HOST)
            if t is not None and combined_here(out):
                t = self.gather.totals[k].partial(t, chunk.size)
            elif t is not None and (whole or not out.stacked):
                t = t.clone()
            outs.append(t)
        self.gather.add(chunk.start, chunk.stop, outs)

    def _combined(self, ref: Any) -> None:
        """Gather a combined group, or hand its tasks out again if their results were lost."""
        lost = self.combiner.take(ref)
        if lost is not None:
            self.schedule.put_back(lost.chunks)
            self._count(lost.worker, lost.chunks, "results lost", lost.reason)

    # -- faults

    def _failed(self, ref: Any, worker: RayWorker, chunk: Chunk, failure: Failure) -> None:
        """A worker could not compute a task.

        Temporary failures are tried again, errors of the function itself are not.
        """
        if failure.poisoned:
            self._lost(worker, "device failed", f"{failure.error}\n{failure.traceback}")
            return
        if failure.passing and self.schedule.blame(chunk):
            del self.flying[ref]
            delay = PATIENCE_SECONDS * 2 ** (self.schedule.deaths(chunk) - 1)
            self.later.append((time.perf_counter() + delay, worker, chunk))
            self._count(worker, [chunk], "place not reached", failure.error)
            return
        if failure.kind:
            raise getattr(errors, failure.kind)(self._told(worker, chunk, failure.error))
        raise errors.WorkerError(
            f"{self._where(worker, chunk)}: {failure.error}\n\nOn the worker:\n{failure.traceback}"
        )

    def _lost(self, worker: RayWorker, cause: str, text: str) -> None:
        """Replace a worker, and hand its tasks out again.

        The first was being computed, the others were waiting for it.
        """
        chunks = self.schedule.leave(worker)
        self.flying = {
            ref: flight for ref, flight in self.flying.items() if flight.worker is not worker
        }
        self.later = [item for item in self.later if item[1] is not worker]
        place = worker.place
        worker.stop(self.ray)
        self.startup.add(worker)
        self.crowds = self.pool.crowds()
        if not chunks:
            return
        first = chunks[0]
        if not self.schedule.blame(first):
            raise errors.WorkerError(
                f"{self._where(worker, first)}: the worker died "
                f"{self.schedule.deaths(first)} times, "
                "so the task is not tried again; if "
                f"memory ran out, pass a smaller chunk_size or memory_budget. The last time: {text}"
            )
        if cause == "memory ran out":
            self.halvings += 1
        elif cause == "worker died":
            self.killed[first] += 1
        reason = text.strip().partition("\n")[0]
        smaller = (
            "; from now on tasks are computed in smaller chunks"
            if cause == "memory ran out"
            else ""
        )
        text = "%s: %s died with samples %d to %d and is replaced%s: %s"
        logger.warning(text, self.job.call, place, first.start, first.stop - 1, smaller, reason)
        self._count(worker, chunks, cause, reason, quiet=True)

    def _count(
        self,
        worker: RayWorker,
        chunks: Sequence[Chunk],
        cause: str,
        reason: str,
        quiet: bool = False,
    ) -> None:
        """Count tasks that are handed out again."""
        self.redone[cause] += len(chunks)
        for chunk in chunks:
            emit(ChunkRedone(worker.name, chunk.start, chunk.stop, f"{cause}: {reason}"))
            if not quiet:
                text = "%s: samples %d to %d are handed out again, %s: %s"
                logger.warning(text, self.job.call, chunk.start, chunk.stop - 1, cause, reason)

    def _where(self, worker: RayWorker, chunk: Chunk) -> str:
        return worker.failed_with(self.job.call, chunk)

    def _told(self, worker: RayWorker, chunk: Chunk, message: str) -> str:
        """A worker's error message with the range of samples that it is about."""
        text = message.removeprefix(f"{self.job.call}: ")
        return (
            f"{self.job.call}: {text} (samples {chunk.start} to {chunk.stop - 1}, {worker.place})"
        )


def _of_memory(exceptions: Any, error: Exception) -> bool:
    """True if Ray ended a worker because its machine was short of memory."""
    return (
        isinstance(error, exceptions.OutOfMemoryError)
        or "OUT_OF_MEMORY" in str(error)
        or "memory monitor" in str(error)
    )
