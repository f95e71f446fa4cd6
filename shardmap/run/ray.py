"""Run a map on a Ray cluster.

Tasks go to a pool of worker processes, which receive the recorded program and never the user's
function.

This module refuses maps that a cluster cannot run, cuts the batch, and plans maps on a cluster;
`shardmap.run.driver` hands out the tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from shardmap import errors
from shardmap._extras import require
from shardmap.planning.cluster import task_rows
from shardmap.planning.device import Budget
from shardmap.planning.memory import format_bytes
from shardmap.planning.split import Chunk, Collected, Split, chunks_of, cut, split, unplanned
from shardmap.run import local, prepare
from shardmap.run.base import Job
from shardmap.run.driver import Driver
from shardmap.run.pool import Ray, pool_of
from shardmap.run.sites import WATCHED_FROM, sites
from shardmap.run.worker_io import combined_here, on_worker, read_there
from shardmap.store import Store
from shardmap.trace.recording import element

_START_SECONDS = 30.0
"""Seconds that a plan waits for workers to report their memory."""


def asked_for(devices: Any) -> Ray | None:
    """The cluster that `devices` names, or None."""
    if isinstance(devices, Ray):
        return devices
    return Ray() if isinstance(devices, str) and devices == "ray" else None


def worker_count(options: Ray, call: str) -> int:
    """Number of workers that a call would have.

    It is the number in `options`, or one per slot of the cluster.

    Raises:
        MissingExtraError: Ray is not installed.
        ClusterError: The cluster cannot be reached.
        OptionError: No machine of it has the resources of a worker.
    """
    if options.workers is not None:
        return options.workers
    with pool_of(_ray(), options, call) as pool:
        return len(pool.workers)


def run(
    job: Job, chunk_size: Any, options: Ray, budget: Budget, store: Store | None = None
) -> list[torch.Tensor]:
    """The outputs of all samples, stacked or reduced, on their devices; none if they go to a store.

    Args:
        job: The mapped call.
        chunk_size: Samples per task; "auto" or None for about eight tasks per worker. For a store
            its units are the tasks.
        options: Number of workers, and the resources of each.
        budget: Bytes that the map may add in this process, and in each worker.
        store: Store that workers write to instead of returning; only the units that are missing
            there are computed.

    Raises:
        MissingExtraError: Ray is not installed.
        ClusterError: The cluster cannot be reached.
        OptionError: Outer gradients would have to flow through the cluster, or it lacks what
            `options` requires.
        OverBudget: The results do not fit where they are gathered, or not one sample fits on a
            worker.
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
            chunks = list(
                chunks_of(
                    job.samples,
                    task_rows(job.samples, len(pool.workers), _travelling_bytes(job), chunk_size),
                )
            )
        size = None if isinstance(chunk_size, int) else "auto"
        return Driver(pool, job, chunks, size, budget, store).run()


def _ray() -> Any:
    return require("ray", extra="ray", purpose="for devices='ray'")


def _travelling_bytes(job: Job) -> int:
    """Bytes of one sample and its results that pass between the driver and a worker."""
    sent = sum(t[:1].nbytes for i, t in enumerate(job.inputs) if i not in read_there(job))
    return sent + sum(o.sample_bytes for o in job.outputs if o.stacked or combined_here(o))


def refuse(job: Job, chunk_size: Any, budget: Budget | None) -> None:
    """Refuse a map that a cluster cannot run, before anything is started.

    Args:
        job: The mapped call.
        chunk_size: The user's option.
        budget: Bytes that the map may add in this process if results are gathered; None if they
            are not.
    """
    call = job.call
    if isinstance(chunk_size, Mapping):
        raise errors.OptionError(
            f"{call}: chunk_size={chunk_size!r} and devices='ray': workers have no names; pass one "
            "int, or 'auto'"
        )
    if job.grad or any(element(t) is not t for t in (*job.inputs, *job.recording.captured)):
        # Could be supported here by an autograd node whose backward is another map, over the same
        # samples and their cotangents.
        raise errors.OptionError(
            f"{call}: devices='ray' and an output would require grad: gradients from outside do "
            "not flow through other processes; "
            "take the gradient inside the mapped function (torch.autograd.grad), call it under "
            "torch.no_grad(), or use devices='auto'"
        )
    if job.recording.written_inputs:
        number = min(job.recording.written_inputs)
        raise errors.CapturedWriteError(
            f"{call}: devices='ray' and the function writes in place to mapped argument {number}: "
            "workers compute on copies, so the "
            "write would not reach the caller's batch; clone the argument inside the function and "
            "return it, or use devices='auto'"
        )
    for device in {o.device for o in job.outputs} if budget is not None else ():
        size = sum(
            o.sample_bytes * job.samples for o in job.outputs if o.stacked and o.device == device
        )
        room = budget.on(device) if budget is not None else None
        if size >= WATCHED_FROM and room is not None and size > room:
            raise errors.OverBudget(
                f"{call}: the results need {format_bytes(size)} on {device}, where they are "
                f"gathered, budget {format_bytes(room)}; let the "
                "workers write them to a store, out=shardmap.ZarrSink(path), or keep less of them "
                "with reduce="
            )


def planned(job: Job, chunk_size: Any, options: Ray, budget: Budget) -> Split:
    """The plan of a map on a cluster, from the facts that its workers report.

    It predicts each worker's chunks, the time, and the memory of one task.

    A task is measured in this process; where workers have GPUs and this one has none, its memory
    there is a guess.

    Raises:
        ClusterError: The cluster cannot be reached.
        OptionError: The cluster lacks the resources in `options`.
    """
    ray = _ray()
    refuse(job, chunk_size, None)
    with pool_of(ray, options, job.call) as pool:
        starting = [worker.start() for worker in pool.workers if not worker.ready]
        if starting:
            ray.wait(starting, num_returns=len(starting), timeout=_START_SECONDS)
        for worker in pool.workers:
            if not worker.ready and ray.wait([worker.start()], timeout=0)[0]:
                try:
                    worker.started(ray.get(worker.start()))
                except ray.exceptions.RayError:  # the run starts it again, or says why it cannot
                    worker.stop(ray)
        crowds = pool.crowds()
        rows = cut(job.samples, len(pool.workers))
        step = max(
            1,
            min(
                task_rows(job.samples, len(pool.workers), _travelling_bytes(job), chunk_size),
                job.samples,
            ),
        )
        size = None if isinstance(chunk_size, int) else "auto"
        home = str(job.home)
        outputs = tuple([on_worker(o, stored=False) for o in job.outputs])
        heads = [t.narrow(0, 0, min(step, t.shape[0])) for t in job.inputs]
        # the function's result is not known for the task's last sample
        unknown = dataclasses.replace(job.lowerings, expected=())
        task = dataclasses.replace(
            job,
            samples=min(step, job.samples),
            inputs=heads,
            outputs=outputs,
            lowerings=unknown,
        )
        (site,) = sites(
            task, prepare.Devices(task), [home], lambda device: None, step > 1, bool(job.samples)
        )
        lanes = []
        for worker, share in zip(pool.workers, rows, strict=True):
            peers = pool.peers(worker, crowds)
            (lane,) = split(
                task.samples,
                [dataclasses.replace(site, budget_bytes=budget.of(worker.free_bytes, peers))],
                size,
                sharing=peers,
            ).lanes
            seconds = lane.seconds * share / max(1, task.samples)
            lanes.append(
                dataclasses.replace(
                    lane, name=worker.name, worker=worker.name, rows=share, seconds=seconds
                )
            )
    gathered = sum(o.sample_bytes * (job.samples if o.stacked else 1) for o in job.outputs)
    home_device = job.outputs[0].device if job.outputs else job.home
    return Split(
        job.samples, tuple(lanes), Collected(str(home_device), gathered, budget.on(home_device))
    )
