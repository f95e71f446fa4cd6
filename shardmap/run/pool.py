"""The pool of workers on a Ray cluster: joined, started, replaced, and released.

Starting a worker costs seconds (it imports torch), so the pool outlives the call: it is kept for
the process, and its workers end when they have been idle for a while, so that other work on
the same cluster gets their slots.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import hashlib
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardmap import errors
from shardmap._threads import fork_safe_lock
from shardmap.planning.split import Chunk
from shardmap.program.ir import Program
from shardmap.run.remote import Worker

_TEXTS = 64
_REACH_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Ray:
    """Run on Ray.

    On the cluster that this process has joined, on the one that RAY_ADDRESS names, or on this
    machine.

    Args:
        workers: Number of worker processes; None for one per GPU, or one per `num_cpus` cores where
            the cluster has no GPU.
        num_cpus: Cores per worker, and its number of torch threads.
        num_gpus: GPUs per worker, which may be a fraction; None for 1 where the cluster has GPUs,
            else 0.
        address: The cluster to join, `host:port`, if this process has not joined one; by default
            that of RAY_ADDRESS, or a new Ray of this machine alone.
        runtime_env: Ray's description of what workers need (packages, environment variables), as
            `ray.init` takes it.
        idle_seconds: Workers wait this long for the next call before they end.

    Raises:
        OptionError: A value is out of range, or of the wrong kind.

    Example:
        >>> import shardmap
        >>> shardmap.Ray(workers=2).workers
        2
    """

    workers: int | None = None
    num_cpus: float = 1
    num_gpus: float | None = None
    address: str | None = None
    runtime_env: Mapping[str, Any] | None = None
    idle_seconds: float = 60.0

    def __post_init__(self) -> None:
        whole = self.workers is None or (
            isinstance(self.workers, int)
            and not isinstance(self.workers, bool)
            and self.workers > 0
        )
        if not whole:
            raise errors.OptionError(
                f"shardmap.Ray: workers={self.workers!r}; pass a positive int, or None for one per "
                "GPU or core"
            )
        for name, least in (("num_cpus", 0), ("num_gpus", 0), ("idle_seconds", 0)):
            value = getattr(self, name)
            if value is None and name == "num_gpus":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                raise errors.OptionError(
                    f"shardmap.Ray: {name}={value!r}; pass a number that is at least {least}"
                )
        if self.address is not None and (not isinstance(self.address, str) or not self.address):
            raise errors.OptionError(
                f"shardmap.Ray: address={self.address!r}; pass 'host:port', or None for "
                "RAY_ADDRESS or a Ray of its own"
            )
        if self.runtime_env is not None and not isinstance(self.runtime_env, Mapping):
            raise errors.OptionError(
                f"shardmap.Ray: runtime_env={self.runtime_env!r}; pass a dict as ray.init takes "
                "it, or None"
            )


@dataclass(slots=True, eq=False)
class RayWorker:
    """One slot of the pool, and the process that fills it."""

    number: int
    remote: Any
    """Function that makes an actor."""
    actor: Any = None
    ready: bool = False
    pid: int | None = None
    node: str = ""
    """The machine of the process."""
    device: str = ""
    """The device that it computes on."""
    free_bytes: int | None = None
    """Bytes that its device had left when the process started."""
    starting: Any = None

    @property
    def name(self) -> str:
        """Name of the worker in events, the progress bar and the plan."""
        return f"ray:{self.number}"

    def start(self) -> Any:
        """A reference that is ready once the process is.

        The process is started if there is none.
        """
        if self.actor is None:
            self.actor = self.remote()
            self.starting = self.actor.info.remote()
        return self.starting

    def started(self, info: Mapping[str, Any]) -> None:
        """Take in the facts that a started process reports."""
        self.ready, self.pid, self.node, self.device = (
            True,
            info["pid"],
            info["node"],
            info["device"],
        )
        self.free_bytes = info["free_bytes"]

    def stop(self, ray: Any) -> None:
        """End the process."""
        if self.actor is not None:
            ray.kill(self.actor, no_restart=True)
        self.actor, self.ready, self.pid, self.starting = None, False, None, None

    def failed_with(self, call: str, chunk: Chunk) -> str:
        """The beginning of an error message about a task of this worker."""
        return (
            f"{call}: samples {chunk.start} to {chunk.stop - 1} failed on a Ray worker, "
            f"{self.place}"
        )

    @property
    def place(self) -> str:
        """Name, process and machine of the worker, for messages."""
        return (
            f"{self.name} (process {self.pid} on {self.node})"
            if self.pid is not None
            else self.name
        )


@dataclass(slots=True)
class Pool:
    """The worker processes of this process."""

    ray: Any
    """The ray package."""
    options: Ray
    job_id: str
    """Ray's id of this process's connection: after a shutdown and a new start the actors are
    gone."""
    workers: list[RayWorker]
    make: Any
    """Function that makes an actor."""
    gpus: float
    """GPUs of each worker."""
    texts: collections.OrderedDict[Program, tuple[str, Any]] = field(
        default_factory=collections.OrderedDict
    )
    timer: threading.Timer | None = None

    def text(self, program: Program) -> tuple[str, Any]:
        """A program's digest, and its text in the object store."""
        known = self.texts.get(program)
        if known is None:
            text = program.dumps().encode()
            known = self.texts[program] = (
                hashlib.sha256(text).hexdigest(),
                self.ray.put(np.frombuffer(text, np.uint8)),
            )
            while len(self.texts) > _TEXTS:
                self.texts.popitem(last=False)
        self.texts.move_to_end(program)
        return known

    def grow(self) -> list[RayWorker]:
        """Add workers for slots that have joined the cluster since, and return them.

        There are none if the user fixed the number of workers.
        """
        if self.options.workers is not None:
            return []
        slots = _slots(
            [n["Resources"] for n in self.ray.nodes() if n["Alive"]],
            self.options.num_cpus,
            self.gpus,
        )
        fresh = [RayWorker(i, self.make) for i in range(len(self.workers), slots)]
        self.workers += fresh
        return fresh

    def crowds(self) -> collections.Counter[str]:
        """Number of ready workers on each machine."""
        return collections.Counter([worker.node for worker in self.workers if worker.ready])

    def peers(self, worker: RayWorker, crowds: Mapping[str, int]) -> int:
        """Number of workers that share a worker's memory, itself included.

        They are those on its machine, or those on its GPU.
        """
        if worker.device.startswith("cuda"):
            return max(1, round(1 / self.gpus)) if 0 < self.gpus < 1 else 1
        return max(1, crowds.get(worker.node, 0))

    def is_connected(self) -> bool:
        """True if this process still belongs to the cluster that the workers run on."""
        return (
            self.ray.is_initialized() and self.ray.get_runtime_context().get_job_id() == self.job_id
        )

    def close(self) -> None:
        """End the workers."""
        if self.timer is not None:
            self.timer.cancel()
        if self.is_connected():
            for worker in self.workers:
                worker.stop(self.ray)


_lock = fork_safe_lock()
_in_use = False
_pool: Pool | None = None
_registered = False


@contextlib.contextmanager
def pool_of(ray: Any, options: Ray, call: str) -> Iterator[Pool]:
    """The pool for `options`, for one call at a time.

    Its workers end when it has been idle for a while.

    Raises:
        ClusterError: This thread is in the middle of a call on the cluster, which a signal handler
            or a finalizer has come into.
    """
    global _pool, _registered, _in_use
    with _lock:
        if _in_use:
            raise errors.ClusterError(
                f"{call}: a map on the cluster is running in this thread, and this call comes in "
                "between (from a signal handler or a finalizer); pass devices='cpu' there"
            )
        _join(ray, options, call)
        pool = _pool
        if pool is not None:
            if pool.timer is not None:
                pool.timer.cancel()
            if pool.options != options or not pool.is_connected():
                pool.close()
                pool = None
        if pool is None:
            if not _registered:
                atexit.register(
                    _at_exit
                )  # after ray's own, which was registered on its import: so it runs before that
                _registered = True
            pool = _pool = _made(ray, options, call)
        try:
            _in_use = True
            yield pool
        finally:
            _in_use = False
            pool.timer = threading.Timer(options.idle_seconds, _release_if_idle, (pool,))
            pool.timer.daemon = True
            pool.timer.start()


def _join(ray: Any, options: Ray, call: str) -> None:
    """Join the named cluster, or start Ray on this machine alone.

    Nothing is done if this process has joined one already.

    Raises:
        ClusterError: It cannot be reached, or this process has joined another one.
    """
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if options.address not in (None, "auto", joined):
            raise errors.ClusterError(
                f"{call}: devices={options!r}, and this process has joined the cluster at {joined} "
                "already; call ray.shutdown() first, or "
                "leave address= away"
            )
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = options.address or os.environ.get("RAY_ADDRESS")
    # Ray reports usage unless told otherwise, and says so only on the console, which is quiet here,
    # so that the user would not know.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address or address == "local":
        ray.init(address="local", num_cpus=_cores(), include_dashboard=False, **quiet)
        return
    if address.startswith("ray://"):
        raise errors.ClusterError(
            f"{call}: {address} is an address of Ray Client, through which all samples would pass "
            "twice; submit the script to the cluster "
            "(`ray job submit`), or run it on one of its machines and give host:port"
        )
    try:
        if ":" in address:
            host, _, port = address.rpartition(":")
            socket.create_connection(
                (host or "127.0.0.1", int(port)), timeout=_REACH_SECONDS
            ).close()  # Ray itself tries for minutes
        ray.init(address=address, **quiet)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, gRPC's own: by version
        raise errors.ClusterError(
            f"{call}: no Ray cluster can be reached at {address} ({first_line(error)}); start one "
            "there (`ray start --head`), or correct "
            "address= or RAY_ADDRESS"
        ) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _made(ray: Any, options: Ray, call: str) -> Pool:
    """A pool of workers that are not started yet.

    Raises:
        OptionError: No machine of the cluster has what one of them needs.
    """
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    gpus = (
        options.num_gpus
        if options.num_gpus is not None
        else (1 if any(n.get("GPU", 0) >= 1 for n in nodes) else 0)
    )
    slots = _slots(nodes, options.num_cpus, gpus)
    if slots == 0 and options.workers is None:
        there = "; ".join(f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes)
        raise errors.OptionError(
            f"{call}: devices={options!r} needs {options.num_cpus:g} CPU and {gpus:g} GPU per "
            "worker, and no machine of the cluster "
            f"has that ({there}); ask for less, or start Ray with more"
        )
    how = {
        "num_cpus": options.num_cpus,
        "num_gpus": gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": "SPREAD",
    }
    if options.runtime_env is not None:
        how["runtime_env"] = dict(options.runtime_env)
    actor = ray.remote(Worker).options(**how)
    threads, device_type = max(1, int(options.num_cpus)), "cuda" if gpus else "cpu"

    def make() -> Any:
        return actor.remote(threads, device_type)

    workers = [RayWorker(i, make) for i in range(options.workers or slots)]
    return Pool(ray, options, ray.get_runtime_context().get_job_id(), workers, make, gpus)


def _slots(nodes: list[dict[str, float]], cpus: float, gpus: float) -> int:
    """Number of workers that the machines have room for; each worker lives on one machine."""
    asked = {"CPU": cpus, "GPU": gpus}
    return sum(
        min((int(n.get(kind, 0) // each) for kind, each in asked.items() if each), default=_cores())
        for n in nodes
    )


def lost_errors(ray: Any) -> tuple[type[Exception], ...]:
    """Ray's errors which say that a worker has died or that results are gone with a machine."""
    e = ray.exceptions
    return (
        e.RayActorError,
        e.WorkerCrashedError,
        e.OutOfMemoryError,
        e.NodeDiedError,
        e.ObjectLostError,
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message: Ray's fill a page."""
    return str(error).strip().partition("\n")[0]


def _release_if_idle(pool: Pool) -> None:
    """End the pool's workers, unless a call uses them or has used them since."""
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
    if _lock.acquire(
        timeout=1.0
    ):  # a background thread may be in a call: then Ray's own exit ends the workers
        _release()


def _release() -> None:
    global _pool
    if _pool is not None and not _in_use:
        _pool.close()
        _pool = None
