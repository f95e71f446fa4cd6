"""Run a map on a Ray cluster: tasks for a pool of worker processes, which receive the recorded program and never the user's function.

The driver hands out tasks, each a run of consecutive samples, and takes what comes back: results that it gathers, sums that it adds up, or
receipts for what workers have written to a store. It holds a few tasks at a time, whatever the size of the batch.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shardmap import errors
from shardmap.extras import require
from shardmap.planning.cluster import task_rows
from shardmap.planning.device import Budget
from shardmap.planning.memory import format_bytes
from shardmap.planning.split import Chunk, Collected, Split, chunks_of, cut, split, unplanned
from shardmap.recording import element
from shardmap.reduce import Reduction
from shardmap.run import local, prepare
from shardmap.run.base import ChunkDone, ChunkRedone, Job, Output, RunFinished, RunStarted, emit
from shardmap.run.gather import Gather
from shardmap.run.packing import Packed, pack, unpack
from shardmap.run.pool import Pool, Ray, RayWorker, pool_of
from shardmap.run.remote import HOST, Constants, Done, Failure, Settings, Task
from shardmap.run.schedule import Schedule
from shardmap.store import Store

logger = logging.getLogger("shardmap")

WINDOW = 2
"""Tasks handed to a worker at a time: one that it computes, and one whose samples travel meanwhile."""

RETRIES = 3
"""How often a task is computed again after the worker that had it died, or a store could not be reached."""

PATIENCE_SECONDS = 1.0
"""Before a store that could not be reached is tried again; twice as long each further time."""

FAN = 8
"""Tasks whose reduced outputs a worker puts together before the driver gets them."""

APART_BYTES = 1 << 18
"""Of a task's reduced outputs, from which on they are put together by workers: below, they come with the task's end at no cost."""

_WAIT_SECONDS = 30.0
_GROW_SECONDS = 2.0


def asked_for(devices: Any) -> Ray | None:
    """The cluster that `devices` means, if it means one."""
    if isinstance(devices, Ray):
        return devices
    return Ray() if isinstance(devices, str) and devices == "ray" else None


def worker_count(options: Ray, call: str) -> int:
    """How many workers a call would have: of the number that was asked for, or one per slot of the cluster.

    Raises:
        MissingExtraError: Ray is not installed.
        ClusterError: The cluster cannot be reached.
        OptionError: No machine of it has what a worker needs.
    """
    if options.workers is not None:
        return options.workers
    with pool_of(_ray(), options, call) as pool:
        return len(pool.workers)


def run(job: Job, chunk_size: Any, options: Ray, budget: Budget, store: Store | None = None) -> list[torch.Tensor]:
    """The outputs of all samples, stacked or reduced, on their devices; none if they go to a store.

    Args:
        job: The mapped call.
        chunk_size: Samples per task; "auto" or None for about eight tasks per worker. Of a store, its units are the tasks.
        options: How many workers, and what each of them has.
        budget: What the map may add in this process, and in each worker.
        store: Where workers write instead of returning; only the units that are missing there are computed.

    Raises:
        MissingExtraError: Ray is not installed.
        ClusterError: The cluster cannot be reached.
        OptionError: Outer gradients would have to flow through the cluster, or it lacks what `options` asks for.
        OverBudget: The results do not fit where they are gathered, or not one sample fits on a worker.
        CapturedWriteError: The function writes in place to a mapped input.
        StoreError: The store cannot be written to.
        WorkerError: A task raised an error on its worker, or its workers died again and again.
    """
    ray = _ray()
    refuse(job, chunk_size, budget if store is None else None)
    if job.samples == 0:
        return local.run(job, unplanned(0, str(job.home)), prepare.Devices(job), store)
    with pool_of(ray, options, job.call) as pool:
        if store is not None:
            chunks = [Chunk(*store.header.rows(unit)) for unit in store.missing()]
        else:
            chunks = list(chunks_of(job.samples, task_rows(job.samples, len(pool.workers), _travelling_bytes(job), chunk_size)))
        size = None if isinstance(chunk_size, int) else "auto"
        return _Run(pool, job, chunks, size, budget, store).run()


def _ray() -> Any:
    return require("ray", extra="ray", purpose="for devices='ray'")


def _travelling_bytes(job: Job) -> int:
    """Of one sample and its results, between the driver and a worker."""
    sent = sum(t[:1].nbytes for i, t in enumerate(job.inputs) if i not in _read_there(job))
    return sent + sum(o.sample_bytes for o in job.outputs if o.stacked or _folded(o))


def _read_there(job: Job) -> set[int]:
    """The inputs that workers read themselves."""
    return {i for i, column in job.columns.items() if column.travels}


def _folded(out: Output) -> bool:
    """Whether an output is combined by a function of the user's, which does not travel: then the driver calls it."""
    return out.reduction is not None and out.reduction.combine is not None


def refuse(job: Job, chunk_size: Any, budget: Budget | None) -> None:
    """Refuse what a cluster cannot do, before anything is started.

    Args:
        job: The mapped call.
        chunk_size: As the user gave it.
        budget: What the map may add in this process, where results are gathered; None where they are not.
    """
    call = job.call
    if isinstance(chunk_size, Mapping):
        raise errors.OptionError(f"{call}: chunk_size={chunk_size!r} and devices='ray': workers have no names; pass one int, or 'auto'")
    if job.grad or any(element(t) is not t for t in (*job.inputs, *job.recording.captured)):
        # Its place, when it is built: an autograd node whose backward is another map, over the same samples and their cotangents.
        raise errors.OptionError(
            f"{call}: devices='ray' and an output would require grad: gradients from outside do not flow through other processes; "
            "take the gradient inside the mapped function (torch.autograd.grad), call it under torch.no_grad(), or use devices='auto'"
        )
    if job.recording.written_inputs:
        number = min(job.recording.written_inputs)
        raise errors.CapturedWriteError(
            f"{call}: devices='ray' and the function writes in place to mapped argument {number}: workers compute on copies, so the "
            "write would not reach the caller's batch; clone the argument inside the function and return it, or use devices='auto'"
        )
    for device in {o.device for o in job.outputs} if budget is not None else ():
        size = sum(o.sample_bytes * job.samples for o in job.outputs if o.stacked and o.device == device)
        room = budget.on(device) if budget is not None else None
        if size >= prepare.WATCHED_FROM and room is not None and size > room:
            raise errors.OverBudget(
                f"{call}: the results need {format_bytes(size)} on {device}, where they are gathered, budget {format_bytes(room)}; let the "
                "workers write them to a store, out=shardmap.ZarrSink(path), or keep less of them with reduce="
            )


def planned(job: Job, chunk_size: Any, options: Ray, budget: Budget) -> Split:
    """Who is expected to compute how much, from what the workers report: the memory of one task on each, its chunks, its time.

    A task is observed in this process; where workers have GPUs and this one has none, its memory there is a guess.

    Raises:
        ClusterError: The cluster cannot be reached.
        OptionError: The cluster lacks what is asked for.
    """
    ray = _ray()
    refuse(job, chunk_size, None)
    with pool_of(ray, options, job.call) as pool:
        starting = [worker.start() for worker in pool.workers if not worker.ready]
        if starting:
            ray.wait(starting, num_returns=len(starting), timeout=_WAIT_SECONDS)
        for worker in pool.workers:
            if not worker.ready and ray.wait([worker.start()], timeout=0)[0]:
                worker.started(ray.get(worker.start()))
        rows = cut(job.samples, len(pool.workers))
        step = max(1, min(task_rows(job.samples, len(pool.workers), _travelling_bytes(job), chunk_size), job.samples))
        size = None if isinstance(chunk_size, int) else "auto"
        home = str(job.home)
        outputs = tuple([_on_worker(o, False) for o in job.outputs])
        heads = [t.narrow(0, 0, min(step, t.shape[0])) for t in job.inputs]
        task = dataclasses.replace(job, samples=min(step, job.samples), inputs=heads, outputs=outputs)
        (site,) = prepare.sites(task, prepare.Devices(task), [home], lambda device: None, step > 1, bool(job.samples))
        lanes = []
        for worker, share in zip(pool.workers, rows, strict=True):
            free = worker.free_bytes
            room = budget.bytes or (None if free is None else int(free * budget.fraction / _peers(pool, worker)))
            (lane,) = split(task.samples, [dataclasses.replace(site, budget_bytes=room)], size).lanes
            seconds = lane.seconds * share / max(1, task.samples)
            lanes.append(dataclasses.replace(lane, name=worker.name, worker=worker.name, rows=share, seconds=seconds))
    gathered = sum(o.sample_bytes * (job.samples if o.stacked else 1) for o in job.outputs)
    home_device = job.outputs[0].device if job.outputs else job.home
    return Split(job.samples, tuple(lanes), Collected(str(home_device), gathered, budget.on(home_device)))


def _peers(pool: Pool, worker: RayWorker) -> int:
    """How many workers share a worker's memory: those on its machine, or on its part of a GPU."""
    if worker.device.startswith("cuda"):
        return max(1, round(1 / pool.gpus)) if 0 < pool.gpus < 1 else 1
    return max(1, sum(w.ready and w.node == worker.node for w in pool.workers))


class _Arrivals(Gather):
    """Results that come from workers: copied on the one thread that has nothing else to do.

    torch copies on all of them, which then spin for a while on the cores that workers compute on: half a megabyte cost 3.5 ms of CPU.
    """

    def put(self, slot: torch.Tensor, t: torch.Tensor) -> None:
        """Copy a task's results to where they belong."""
        if slot.device.type != "cpu" or not (slot.is_contiguous() and t.is_contiguous()):
            slot.copy_(t)
            return
        np.copyto(slot.flatten().view(torch.uint8).numpy(), t.flatten().view(torch.uint8).numpy())


@dataclass(slots=True)
class _Flight:
    """A task on its way."""

    worker: RayWorker
    chunk: Chunk
    apart: Any = None
    """The reference of its reduced outputs, where those are put together by workers."""


@dataclass(slots=True)
class _Group:
    """Neighbouring tasks whose reduced outputs a worker puts together."""

    chunks: tuple[Chunk, ...]
    parts: dict[Chunk, Any]
    """The references of those that are there."""
    tries: int = 0


class _Run:
    """One mapped call on the pool: hands out tasks, gathers results in whatever order they come, replaces workers that die."""

    def __init__(self, pool: Pool, job: Job, chunks: Sequence[Chunk], chunk_size: Any, budget: Budget, store: Store | None):
        self.pool, self.ray, self.job, self.store = pool, pool.ray, job, store
        self.workers = sorted(pool.workers, key=lambda w: not w.ready)[: max(1, len(chunks))]
        self.tasks = len(chunks)
        self.key = uuid.uuid4().hex
        low = job.lower("cpu")  # refusals and warnings of the lowering come from here
        self.digest, self.text = pool.text(low.program)
        self.read_there = _read_there(job)
        self.outputs = tuple([_on_worker(o, store is not None) for o in job.outputs])
        self.constants = self.ray.put(self._constants(low.options, chunk_size, budget))
        self.gather = _Arrivals(job)
        self.schedule = Schedule(chunks, WINDOW, RETRIES, expected=len(self.workers))
        self.flying: dict[Any, _Flight] = {}
        self.later: list[tuple[float, RayWorker, Chunk]] = []
        """What is tried again, and when."""
        self.redone: collections.Counter[str] = collections.Counter()
        self.halvings = 0
        self.failed_starts = 0
        self.binding: dict[RayWorker, Any] = {}
        self.bound: set[RayWorker] = set()
        """Workers that have the program."""
        self.every = any(_folded(o) and not o.mapped for o in job.outputs)
        """Whether each task is to bring the outputs that no sample changes: they are counted once per sample."""
        self.names = [o.reduction.name if o.reduction is not None else None for o in self.outputs]
        size = sum(2 * o.sample_bytes for o in self.outputs if o.reduction is not None)
        self.groups = list(_grouped(chunks)) if size >= APART_BYTES and len(chunks) > FAN else []
        self.group_of = {chunk: group for group in self.groups for chunk in group.chunks}
        self.open_groups = len(self.groups)
        self.complete: collections.deque[_Group] = collections.deque()
        """Groups whose tasks are all done, and which no worker puts together yet."""
        self.combining: dict[Any, tuple[_Group, RayWorker]] = {}
        self.grown = time.perf_counter()

    def _constants(self, options: Any, chunk_size: Any, budget: Budget) -> Constants:
        job, recording = self.job, self.job.recording
        captured = tuple([pack(t) for t in recording.captured])
        literals = tuple([(pack(t), t.device == job.home) for t in recording.literals])
        columns = {i: job.columns[i] for i in self.read_there}
        store = self.store if self.store is not None and self.store.travels else None  # otherwise results come here to be written
        return Constants(
            options, captured, literals, recording.scalars, job.seed, recording.sources, Settings.current(), self.outputs, columns,
            store, chunk_size, budget,
        )  # fmt: skip

    def run(self) -> list[torch.Tensor]:
        """Everything, from the first task to the last."""
        started = time.perf_counter()
        emit(RunStarted(self.job.samples, self.tasks, tuple([w.name for w in self.workers])))
        try:
            while self.open_groups or not self.schedule.finished:
                self._hand_out()
                self._wait()
            result = self._finish()
        except BaseException as error:
            # A task that runs cannot be interrupted, and would delay the next call: the worker goes. After Ctrl-C all go.
            interrupted = not isinstance(error, Exception)
            busy = {id(flight.worker) for flight in self.flying.values()}
            for worker in self.workers:
                if interrupted or id(worker) in busy:
                    worker.stop(self.ray)
            raise
        seconds = time.perf_counter() - started
        causes = ", ".join(f"{cause}: {count}" for cause, count in self.redone.items())
        again = f"; handed out again {sum(self.redone.values())} ({causes})" if causes else ""
        logger.info("%s: %d tasks on %d workers in %.1f s%s", self.job.call, self.tasks, len(self.workers), seconds, again)
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

    # -- handing out -----------------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        now = time.perf_counter()
        due = [item for item in self.later if item[0] <= now]
        for item in due:
            self.later.remove(item)
            self.schedule.again(item[1], item[2])
        for worker, chunk in self.schedule.assignments():
            assert isinstance(worker, RayWorker)
            self._submit(worker, chunk)
        self._combine()
        if now - self.grown > _GROW_SECONDS:
            self.grown = now
            if self.schedule.waiting:
                self.workers += self.pool.grow()

    def _submit(self, worker: RayWorker, chunk: Chunk) -> None:
        inputs = tuple([None if t is None else pack(t) for t in self._rows(chunk)])
        unmapped = self.every or chunk.start == 0
        halvings = self.halvings + max(0, self.schedule.deaths(chunk) - 1)
        task = Task(chunk.start, chunk.size, inputs, unmapped, halvings, _peers(self.pool, worker))
        arguments = (self.key, self.digest, self.text, self.constants, task)
        if self.groups:
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

    # -- what comes back -------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        starting = {worker.start(): worker for worker in self.workers if not worker.ready}
        starting |= {self._binding(worker): worker for worker in self.workers if worker.ready and worker not in self.bound}
        refs = [*self.flying, *self.combining, *starting]
        timeout = _GROW_SECONDS if self.pool.options.workers is None else _WAIT_SECONDS
        if self.later:
            timeout = min(timeout, max(0.0, min(item[0] for item in self.later) - time.perf_counter()))
        if not refs:
            time.sleep(timeout)
            return
        done, _ = self.ray.wait(refs, num_returns=1, timeout=timeout)
        if done and len(refs) > 1:
            done, _ = self.ray.wait(refs, num_returns=len(refs), timeout=0)  # all that are ready: each call looks at every reference
        if not done and timeout == _WAIT_SECONDS and not self.flying and not self.combining:
            text = "%s: no Ray worker has started yet; the cluster may have no free slot, or importing torch takes long"
            logger.warning(text, self.job.call)
        for ref in done:
            if ref in starting:
                self._started(starting[ref], ref)
            elif ref in self.combining:
                self._combined(ref)
            else:
                self._finished(ref)

    def _binding(self, worker: RayWorker) -> Any:
        """The reference that is ready once a worker has the program."""
        ref = self.binding.get(worker)
        if ref is None:
            ref = self.binding[worker] = worker.actor.bind.remote(self.key, self.digest, self.text, self.constants)
        return ref

    def _started(self, worker: RayWorker, ref: Any) -> None:
        """A process is there, or has the program; or it is not to be had."""
        try:
            answer = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            worker.stop(self.ray)
            self.binding.pop(worker, None)
            self.failed_starts += 1
            if self.failed_starts > RETRIES * (2 + len(self.workers)):
                raise errors.WorkerError(
                    f"{self.job.call}: worker processes do not start; install one version of shardmap on every machine of the cluster. "
                    f"{error}"
                ) from error
            logger.warning("%s: %s did not start and is started again: %s", self.job.call, worker.name, _first_line(error))
            return
        if worker.ready:
            del self.binding[worker]
            if answer is not None:
                self._cannot_bind(worker, answer)
                return
            self.failed_starts = 0
            self.bound.add(worker)
            self.schedule.join(worker)
            return
        info = answer
        worker.started(info)
        if info["torch"] != torch.__version__:
            text = "%s on %s has torch %s, the driver has %s: results may differ"
            logger.warning(text, worker.name, info["node"], info["torch"], torch.__version__)
        free = "unknown" if info["free_bytes"] is None else format_bytes(info["free_bytes"])
        logger.debug("%s is on %s (%s), %s free, %d threads", worker.place, info["device"], info["name"], free, info["threads"])

    def _cannot_bind(self, worker: RayWorker, failure: Failure) -> None:
        """A worker cannot make anything of the program, or does not see the store."""
        if failure.poisoned or failure.passing:
            self.failed_starts += 1
            worker.stop(self.ray)
            if self.failed_starts <= RETRIES * (2 + len(self.workers)):
                logger.warning("%s: %s is started again: %s", self.job.call, worker.name, failure.error)
                return
        if failure.kind:
            text = failure.error.removeprefix(f"{self.job.call}: ")
            raise getattr(errors, failure.kind)(f"{self.job.call}: {text} ({worker.place})")
        raise errors.WorkerError(f"{self.job.call}: {worker.place}: {failure.error}\n\nOn the worker:\n{failure.traceback}")

    def _finished(self, ref: Any) -> None:
        flight = self.flying.get(ref)
        if flight is None:
            return  # handed out again together with another task of a worker that died
        worker, chunk = flight.worker, flight.chunk
        e = self.ray.exceptions
        try:
            outcome = self.ray.get(ref)
        except (e.RayActorError, e.WorkerCrashedError, e.OutOfMemoryError, e.NodeDiedError, e.ObjectLostError) as error:
            self._lost(worker, "memory ran out" if _of_memory(e, error) else "worker died", str(error))
            return
        except e.RayError as error:
            raise errors.WorkerError(f"{self._where(worker, chunk)}: {error}") from error
        if isinstance(outcome, Failure):
            self._failed(ref, worker, chunk, outcome)
            return
        del self.flying[ref]
        self._take(chunk, outcome)
        self.schedule.done(worker, chunk)
        if flight.apart is not None:
            group = self.group_of[chunk]
            group.parts[chunk] = flight.apart
            if len(group.parts) == len(group.chunks):
                self.complete.append(group)
        for event in outcome.redone:  # its clock is another machine's
            self.redone["memory ran out in a task"] += 1
            emit(ChunkRedone(worker.name, event.start, event.stop, event.reason))
            logger.warning("%s: samples %d to %d on %s: %s", self.job.call, event.start, event.stop - 1, worker.place, event.reason)
        emit(ChunkDone(worker.name, chunk.start, chunk.stop, outcome.seconds))

    def _take(self, chunk: Chunk, outcome: Done) -> None:
        if self.store is not None:
            if outcome.receipt is not None:
                self.store.commit(outcome.receipt)
            else:
                rows = [unpack(p, HOST) for p in outcome.outputs if p is not None]
                self.store.commit(self.store.write(chunk.start // self.store.header.unit, rows))
            return
        # Results lie read-only in Ray's object store. Chunks are copied into the output; what becomes an output itself is cloned.
        whole = chunk.size == self.job.samples
        outs: list[torch.Tensor | None] = []
        for k, (packed, out) in enumerate(zip(outcome.outputs, self.job.outputs, strict=True)):
            t = None if packed is None else unpack(packed, HOST)
            if t is not None and _folded(out):
                t = self.gather.totals[k].partial(t, chunk.size)
            elif t is not None and (whole or not out.stacked):
                t = t.clone()
            outs.append(t)
        self.gather.add(chunk.start, chunk.stop, outs)

    # -- reduced outputs -------------------------------------------------------------------------------------------------

    def _combine(self) -> None:
        """Let workers put together the reduced outputs of neighbouring tasks that are all there."""
        if not self.complete:
            return
        workers = [w for w in self.workers if w in self.bound]
        while self.complete and workers:
            group = self.complete.popleft()
            worker = workers[len(self.combining) % len(workers)]
            parts = [group.parts[chunk] for chunk in group.chunks]
            self.combining[worker.actor.combine.remote(self.names, *parts)] = group, worker

    def _combined(self, ref: Any) -> None:
        group, worker = self.combining.pop(ref)
        e = self.ray.exceptions
        try:
            outcome: Sequence[Packed | None] = self.ray.get(ref)
        except (e.RayActorError, e.WorkerCrashedError, e.OutOfMemoryError, e.NodeDiedError, e.ObjectLostError) as error:
            group.tries += 1
            if group.tries > RETRIES:
                raise errors.WorkerError(f"{self._where(worker, group.chunks[0])}: sums were lost {group.tries} times: {error}") from error
            if isinstance(error, e.ObjectLostError):  # they were on a machine that is gone: their tasks are computed again
                group.parts = {}
                self.schedule.put_back(group.chunks)
                self._count(worker, group.chunks, "results lost", _first_line(error))
            else:
                self.complete.append(group)
            return
        except e.RayError as error:
            raise errors.WorkerError(f"{self._where(worker, group.chunks[0])}: {error}") from error
        start, stop = group.chunks[0].start, group.chunks[-1].stop
        self.gather.add(start, stop, [None if p is None else unpack(p, HOST).clone() for p in outcome])
        group.parts = {}
        self.open_groups -= 1

    # -- faults ----------------------------------------------------------------------------------------------------------

    def _failed(self, ref: Any, worker: RayWorker, chunk: Chunk, failure: Failure) -> None:
        """A worker could not compute a task: what may pass is tried again, what is the function's own is not."""
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
        raise errors.WorkerError(f"{self._where(worker, chunk)}: {failure.error}\n\nOn the worker:\n{failure.traceback}")

    def _lost(self, worker: RayWorker, cause: str, text: str) -> None:
        """Replace a worker, and hand its tasks out again: the first was being computed, the others were waiting for it."""
        chunks = self.schedule.leave(worker)
        self.flying = {ref: flight for ref, flight in self.flying.items() if flight.worker is not worker}
        self.later = [item for item in self.later if item[1] is not worker]
        place = worker.place
        worker.stop(self.ray)
        self.bound.discard(worker)
        if not chunks:
            return
        first = chunks[0]
        if not self.schedule.blame(first):
            raise errors.WorkerError(
                f"{self._where(worker, first)}: the worker died {self.schedule.deaths(first)} times, so the task is not tried again; if "
                f"memory ran out, pass a smaller chunk_size or memory_budget. The last time: {text}"
            )
        if cause == "memory ran out":
            self.halvings += 1
        reason = text.strip().partition("\n")[0]
        smaller = "; from now on tasks are computed in smaller chunks" if cause == "memory ran out" else ""
        text = "%s: %s died with samples %d to %d and is replaced%s: %s"
        logger.warning(text, self.job.call, place, first.start, first.stop - 1, smaller, reason)
        self._count(worker, chunks, cause, reason, quiet=True)

    def _count(self, worker: RayWorker, chunks: Sequence[Chunk], cause: str, reason: str, quiet: bool = False) -> None:
        """Note that tasks are handed out again."""
        self.redone[cause] += len(chunks)
        for chunk in chunks:
            emit(ChunkRedone(worker.name, chunk.start, chunk.stop, f"{cause}: {reason}"))
            if not quiet:
                text = "%s: samples %d to %d are handed out again, %s: %s"
                logger.warning(text, self.job.call, chunk.start, chunk.stop - 1, cause, reason)

    def _where(self, worker: RayWorker, chunk: Chunk) -> str:
        return f"{self.job.call}: samples {chunk.start} to {chunk.stop - 1} failed on a Ray worker, {worker.place}"

    def _told(self, worker: RayWorker, chunk: Chunk, message: str) -> str:
        """A worker's own sentence, with the samples that it was about."""
        text = message.removeprefix(f"{self.job.call}: ")
        return f"{self.job.call}: {text} (samples {chunk.start} to {chunk.stop - 1}, {worker.place})"


def _on_worker(out: Output, stored: bool) -> Output:
    """An output as a worker gives it: on its host, a row per sample, or reduced as far as it can."""
    if out.reduction is not None and not _folded(out):
        return Output(out.shape, out.dtype, HOST, out.mapped, None, Reduction(out.reduction.name), False)
    return Output(out.shape, out.dtype, HOST, out.mapped, 0 if out.mapped or stored else None, None, False)


def _grouped(chunks: Sequence[Chunk]) -> Iterator[_Group]:
    for at in range(0, len(chunks), FAN):
        yield _Group(tuple(chunks[at : at + FAN]), {})


def _of_memory(exceptions: Any, error: Exception) -> bool:
    """Whether Ray ended a worker because its machine was short of memory."""
    return isinstance(error, exceptions.OutOfMemoryError) or "OUT_OF_MEMORY" in str(error) or "memory monitor" in str(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
