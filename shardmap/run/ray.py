"""Run chunks on a Ray cluster: a pool of worker processes that receive the recorded program, never the user's function.

Starting a worker costs seconds (it imports torch), so the pool outlives the call: it is kept for the process, and its workers are
let go when they have been idle for a while, so that other work on the same cluster gets their slots.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shardmap import errors
from shardmap.engine import Lowered
from shardmap.extras import require
from shardmap.planning.split import Chunk, chunks_of, unplanned
from shardmap.program import Program
from shardmap.recording import element
from shardmap.run import local, prepare
from shardmap.run.base import ChunkDone, Job, RunFinished, RunStarted, emit
from shardmap.run.gather import Gather
from shardmap.run.remote import Constants, Failure, Packed, Settings, Task, Worker, pack, unpack

logger = logging.getLogger("shardmap")

CHUNKS_PER_WORKER = 4
"""With chunk_size None. More would even out workers of different speed better; fewer would batch better."""

WINDOW = 2
"""Chunks handed to a worker at a time: one that it computes, and one whose samples travel meanwhile."""

RETRIES = 3
"""How often a chunk is computed again after the worker that had it died."""

_WAIT_SECONDS = 30.0
_TEXTS = 64


@dataclass(frozen=True, slots=True)
class Ray:
    """Run on Ray: on the cluster that this process has joined, on the one that RAY_ADDRESS names, or on this machine.

    Args:
        workers: How many worker processes; None for one per GPU, or one per `num_cpus` cores where the cluster has no GPU.
        num_cpus: Cores per worker, and its number of torch threads.
        num_gpus: GPUs per worker, which may be a fraction; None for 1 where the cluster has GPUs, else 0.
        idle_seconds: Workers wait this long for the next call before they end.

    Raises:
        OptionError: A value is out of range.

    Example:
        >>> import shardmap
        >>> shardmap.Ray(workers=2).workers
        2
    """

    workers: int | None = None
    num_cpus: float = 1
    num_gpus: float | None = None
    idle_seconds: float = 60.0

    def __post_init__(self) -> None:
        whole = self.workers is None or (isinstance(self.workers, int) and not isinstance(self.workers, bool) and self.workers > 0)
        if not whole:
            raise errors.OptionError(f"shardmap.Ray: workers={self.workers!r}; pass a positive int, or None for one per GPU or core")
        for name, least in (("num_cpus", 0), ("num_gpus", 0), ("idle_seconds", 0)):
            value = getattr(self, name)
            if value is None and name == "num_gpus":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                raise errors.OptionError(f"shardmap.Ray: {name}={value!r}; pass a number that is at least {least}")


def asked_for(devices: Any) -> Ray | None:
    """The cluster that `devices` means, if it means one."""
    if isinstance(devices, Ray):
        return devices
    return Ray() if isinstance(devices, str) and devices == "ray" else None


def run(job: Job, chunk_size: Any, options: Ray) -> list[torch.Tensor]:
    """The outputs of all samples, stacked or reduced, on their devices.

    Args:
        job: The mapped call.
        chunk_size: Most samples per chunk; "auto" or None for about four chunks per worker.
        options: How many workers, and what each of them has.

    Raises:
        MissingExtraError: Ray is not installed.
        OptionError: Outer gradients would have to flow through the cluster, or it lacks what `options` asks for.
        CapturedWriteError: The function writes in place to a mapped input.
        WorkerError: A chunk raised an error on its worker, or its workers died again and again.
    """
    call, samples = job.call, job.samples
    ray = require("ray", extra="ray", purpose="for devices='ray'")
    _refuse(job, chunk_size, call)
    low = job.lower("cpu")  # for which outputs are mapped; refusals and warnings of the lowering come from here
    if samples == 0:
        on = prepare.Devices(job)
        return local.run(job, unplanned(0, str(job.home)), on)
    with _pool_of(ray, options, call) as pool:
        asked = chunk_size if isinstance(chunk_size, int) else None
        chunks = chunks_of(samples, asked or max(1, -(-samples // (CHUNKS_PER_WORKER * len(pool.workers)))))
        started = time.perf_counter()
        emit(RunStarted(samples, len(chunks), tuple(w.name for w in pool.workers)))
        result = _Run(pool, job, chunks, low).run()
        emit(RunFinished(time.perf_counter() - started))
    return result


def _refuse(job: Job, chunk_size: Any, call: str) -> None:
    if isinstance(chunk_size, Mapping):
        raise errors.OptionError(f"{call}: chunk_size={chunk_size!r} and devices='ray': workers have no names; pass one int, or 'auto'")
    if job.grad or any(element(t) is not t for t in (*job.inputs, *job.recording.captured)):
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


class _Run:
    """One mapped call on the pool: hands out chunks, gathers results in whatever order they come, replaces workers that die."""

    def __init__(self, pool: _Pool, job: Job, chunks: Sequence[Chunk], low: Lowered):
        self.ray, self.job, self.low = pool.ray, job, low
        self.workers = sorted(pool.workers, key=lambda w: not w.ready)[: len(chunks)]
        self.call = low.options.call
        self.key = uuid.uuid4().hex
        self.digest, self.text = pool.text(low.program)
        self.constants = self.ray.put(_constants(job, low))
        self.gather = Gather(job)
        self.pending = collections.deque(chunks)
        self.deaths: collections.Counter[int] = collections.Counter()  # by a chunk's first sample
        self.failed_starts = 0
        self.every = any(o.reduction is not None and not o.mapped for o in job.outputs)
        """Whether each chunk is to bring the outputs that no sample changes: they are counted once per sample."""
        self.flying: dict[Any, tuple[_Worker, Chunk, float]] = {}  # in the order of handing out

    def run(self) -> list[torch.Tensor]:
        try:
            while self.pending or self.flying:
                self._hand_out()
                self._wait()
        except BaseException as error:
            # A chunk that runs cannot be interrupted, and would delay the next call: the worker goes. After Ctrl-C all go.
            interrupted = not isinstance(error, Exception)
            busy = {id(worker) for worker, _, _ in self.flying.values()}
            for worker in self.workers:
                if interrupted or id(worker) in busy:
                    worker.stop(self.ray)
            raise
        for worker in self.workers:
            if worker.ready:
                worker.actor.forget.remote()
        return self.gather.finish()

    def _hand_out(self) -> None:
        free = {id(w): WINDOW for w in self.workers if w.ready}
        for worker, _, _ in self.flying.values():
            free[id(worker)] -= 1
        for room in range(WINDOW, 0, -1):  # the emptiest workers first, so that the last chunks are spread
            for worker in self.workers:
                if self.pending and worker.ready and free[id(worker)] == room:
                    free[id(worker)] -= 1
                    self._submit(worker, self.pending.popleft())

    def _submit(self, worker: _Worker, chunk: Chunk) -> None:
        inputs = tuple(pack(t[chunk.start : chunk.stop]) for t in self.job.inputs)
        task = Task(chunk.start, inputs, chunk.stop - chunk.start, unmapped=self.every or chunk.start == 0)
        ref = worker.actor.chunk.remote(self.key, self.digest, self.text, self.constants, task)
        self.flying[ref] = worker, chunk, time.perf_counter()

    def _wait(self) -> None:
        starting = {}
        for worker in self.workers:
            if not worker.ready:
                starting[worker.start()] = worker
        done, _ = self.ray.wait([*self.flying, *starting], num_returns=1, timeout=_WAIT_SECONDS)
        if not done and not self.flying:
            logger.warning("%s: no Ray worker has started yet; the cluster may have no free slot, or importing torch takes long", self.call)
        for ref in done:
            if ref in starting:
                self._started(starting[ref], ref)
            else:
                self._finished(ref)

    def _started(self, worker: _Worker, ref: Any) -> None:
        try:
            info = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            worker.stop(self.ray)
            self.failed_starts += 1
            if self.failed_starts > RETRIES:
                raise errors.WorkerError(
                    f"{self.call}: worker processes do not start; install one version of shardmap on every machine of the cluster. {error}"
                ) from error
            logger.warning("%s: %s did not start and is started again: %s", self.call, worker.name, _first_line(error))
            return
        self.failed_starts = 0
        worker.ready, worker.pid = True, info["pid"]
        if info["torch"] != torch.__version__:
            text = "%s on %s has torch %s, the driver has %s: results may differ"
            logger.warning(text, worker.name, info["node"], info["torch"], torch.__version__)
        logger.debug("%s is process %d on %s, on %s", worker.name, info["pid"], info["node"], info["device"])

    def _finished(self, ref: Any) -> None:
        if ref not in self.flying:
            return  # handed out again together with another chunk of a worker that died
        worker, chunk, began = self.flying[ref]
        e = self.ray.exceptions
        try:
            outcome = self.ray.get(ref)
        except (e.RayActorError, e.WorkerCrashedError, e.OutOfMemoryError, e.NodeDiedError, e.ObjectLostError) as error:
            self._lost(worker, _first_line(error), str(error))
            return
        except e.RayError as error:
            raise errors.WorkerError(f"{self._where(chunk)}: {error}") from error
        if isinstance(outcome, Failure):
            if outcome.poisoned:
                self._lost(worker, outcome.error, outcome.traceback)
                return
            raise errors.WorkerError(f"{self._where(chunk)}: {outcome.error}\n\nOn the worker:\n{outcome.traceback}")
        del self.flying[ref]
        self._gather(chunk, outcome)
        emit(ChunkDone(worker.name, chunk.start, chunk.stop, time.perf_counter() - began))

    def _gather(self, chunk: Chunk, outcome: list[Packed | None]) -> None:
        # Results lie read-only in Ray's object store. Chunks are copied into the output; what becomes an output itself is cloned.
        single = chunk.stop - chunk.start == self.job.samples
        outs: list[torch.Tensor | None] = []
        for k, (packed, out) in enumerate(zip(outcome, self.job.outputs, strict=True)):
            if packed is not None:
                t = unpack(packed, torch.device("cpu"))
                if out.reduction is not None:
                    t = self.gather.totals[k].partial(t, chunk.size)
                outs.append(t.clone() if single or not out.mapped else t)
            else:
                outs.append(None)
        self.gather.add(chunk.start, chunk.stop, outs)

    def _lost(self, worker: _Worker, reason: str, text: str) -> None:
        """Replace a worker, and hand its chunks out again: the first was being computed, the others were waiting for it."""
        lost = [(ref, chunk) for ref, (w, chunk, _) in self.flying.items() if w is worker]
        for ref, _ in lost:
            del self.flying[ref]
        worker.stop(self.ray)
        chunks = [chunk for _, chunk in lost]
        self.pending.extendleft(reversed(chunks))
        first = chunks[0]
        self.deaths[first.start] += 1
        if self.deaths[first.start] > RETRIES:
            raise errors.WorkerError(
                f"{self._where(first)}: the worker died {self.deaths[first.start]} times, so the chunk is not tried again; if memory ran "
                f"out, pass a smaller chunk_size. The last time: {text}"
            )
        logger.warning("%s: %s died with samples %d to %d and is replaced: %s", self.call, worker.name, first.start, first.stop - 1, reason)

    def _where(self, chunk: Chunk) -> str:
        return f"{self.call}: samples {chunk.start} to {chunk.stop - 1} failed on a Ray worker"


def _constants(job: Job, low: Lowered) -> Constants:
    recording = job.recording
    captured = tuple(pack(t) for t in recording.captured)
    literals = tuple((pack(t), t.device == job.home) for t in recording.literals)
    return Constants(low.options, captured, literals, recording.scalars, job.seed, recording.sources, Settings.current())


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


# -- the pool ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Worker:
    """One slot of the pool, and the process that fills it."""

    number: int
    remote: Any
    """Makes an actor."""
    actor: Any = None
    ready: bool = False
    pid: int | None = None
    starting: Any = None

    @property
    def name(self) -> str:
        return f"ray:{self.number}"

    def start(self) -> Any:
        """The reference that is ready once the process is; a process is started where there is none."""
        if self.actor is None:
            self.actor = self.remote()
            self.starting = self.actor.info.remote()
        return self.starting

    def stop(self, ray: Any) -> None:
        """End the process."""
        if self.actor is not None:
            ray.kill(self.actor, no_restart=True)
        self.actor, self.ready, self.pid, self.starting = None, False, None, None


@dataclass(slots=True)
class _Pool:
    """The worker processes of this process."""

    ray: Any
    """The ray package."""
    options: Ray
    job_id: str
    """Ray's id of this process's connection: after a shutdown and a new start the actors are gone."""
    workers: list[_Worker]
    texts: collections.OrderedDict[Program, tuple[str, Any]] = field(default_factory=collections.OrderedDict)
    timer: threading.Timer | None = None

    def text(self, program: Program) -> tuple[str, Any]:
        """A program's digest, and its text in the object store."""
        known = self.texts.get(program)
        if known is None:
            text = program.dumps().encode()
            known = self.texts[program] = hashlib.sha256(text).hexdigest(), self.ray.put(np.frombuffer(text, np.uint8))
            while len(self.texts) > _TEXTS:
                self.texts.popitem(last=False)
        self.texts.move_to_end(program)
        return known

    def is_connected(self) -> bool:
        """Whether this process still belongs to the cluster that the workers run on."""
        return self.ray.is_initialized() and self.ray.get_runtime_context().get_job_id() == self.job_id

    def close(self) -> None:
        """End the workers."""
        if self.timer is not None:
            self.timer.cancel()
        if self.is_connected():
            for worker in self.workers:
                worker.stop(self.ray)


_lock = threading.Lock()
_pool: _Pool | None = None
_registered = False


@contextlib.contextmanager
def _pool_of(ray: Any, options: Ray, call: str) -> Iterator[_Pool]:
    """The pool for `options`, for one call at a time; its workers are let go when it has been idle."""
    global _pool, _registered
    with _lock:
        _join(ray)
        pool = _pool
        if pool is not None:
            if pool.timer is not None:
                pool.timer.cancel()
            if pool.options != options or not pool.is_connected():
                pool.close()
                pool = None
        if pool is None:
            if not _registered:
                atexit.register(_at_exit)  # after ray's own, which was registered on its import: so it runs before that
                _registered = True
            pool = _pool = _Pool(ray, options, ray.get_runtime_context().get_job_id(), _workers(ray, options, call))
        try:
            yield pool
        finally:
            pool.timer = threading.Timer(options.idle_seconds, _release_if_idle, (pool,))
            pool.timer.daemon = True
            pool.timer.start()


def _join(ray: Any) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a Ray of this machine alone, unless this process has joined one."""
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return
    # Ray reports usage unless told otherwise, and says so on the console, which is kept quiet here: nobody would know.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=_cores(), include_dashboard=False, **quiet)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers(ray: Any, options: Ray, call: str) -> list[_Worker]:
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    gpus = options.num_gpus if options.num_gpus is not None else (1 if any(n.get("GPU", 0) >= 1 for n in nodes) else 0)
    asked = {"CPU": options.num_cpus, "GPU": gpus}
    # Each node's slots: a worker lives on one node.
    slots = sum(min((int(n.get(kind, 0) // each) for kind, each in asked.items() if each), default=_cores()) for n in nodes)
    if slots == 0:
        there = "; ".join(f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes)
        raise errors.OptionError(
            f"{call}: devices={options!r} needs {asked['CPU']:g} CPU and {asked['GPU']:g} GPU per worker, and no machine of the cluster "
            f"has that ({there}); ask for less, or start Ray with more"
        )
    actor = ray.remote(Worker).options(
        num_cpus=options.num_cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
    )
    threads, device_type = max(1, int(options.num_cpus)), "cuda" if gpus else "cpu"
    return [_Worker(i, lambda: actor.remote(threads, device_type)) for i in range(options.workers or slots)]


def _release_if_idle(pool: _Pool) -> None:
    """End the pool's workers, unless a call is using them or has used them since."""
    if _lock.acquire(blocking=False):
        try:
            if _pool is pool and pool.timer is threading.current_thread():
                _release()
        finally:
            _lock.release()


def release() -> None:
    """End the worker processes that wait for the next call; it starts new ones."""
    with _lock:
        _release()


def _at_exit() -> None:
    if _lock.acquire(timeout=1.0):  # a background thread may be in a call: then Ray's own exit ends the workers
        _release()


def _release() -> None:
    global _pool
    if _pool is not None:
        _pool.close()
        _pool = None
