"""A call whose results go to a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from shardmap import errors
from shardmap._torch import pytree
from shardmap.call import outputs as out_edges
from shardmap.call.job import names_of, split_of
from shardmap.call.options import Options
from shardmap.planning.refusal import refusal_of
from shardmap.run import local, prepare, storing
from shardmap.run import ray as on_ray
from shardmap.run.base import Job
from shardmap.store import Header, OutputSpec, Sink, Store


def refuse_store(job: Job, options: Options, inlined: bool) -> None:
    """Refuse what cannot be written to a store, before anything is made."""
    call = options.call
    if inlined or job.transformed:
        raise errors.OptionError(
            f"{call}: out= and the call stands inside another map or transform, of which it is a "
            "part; leave out= away there"
        )
    if any(o.requires_grad for o in job.outputs):
        raise errors.OptionError(
            f"{call}: out= and an output that requires grad: what is in a store has no history; "
            "call it under torch.no_grad(), or detach "
            "what the function returns"
        )
    if any(o.reduction is not None for o in job.outputs):
        raise errors.OptionError(
            f"{call}: out= and reduce=: what is reduced fits in memory; leave out= away, or map "
            "twice"
        )
    if any(o.dim != 0 for o in job.outputs):
        raise errors.OptionError(
            f"{call}: out= and out_dims={options.out_dims!r}: a store holds a row for each sample; "
            "leave out_dims at 0"
        )


def into_store(
    job: Job,
    options: Options,
    structure: pytree.TreeSpec,
    cluster: on_ray.Ray | None,
    compute: Callable[[Store], None] | None = None,
) -> Store:
    """Compute what the store lacks, unit by unit: here, or on the workers of a cluster.

    Args:
        job: The call.
        options: The call's.
        structure: Of what the function returned for one sample.
        cluster: The workers.
        compute: Fills the store, where no executor takes the job.
    """
    sink, on = options.out, prepare.Devices(job, options.budget.on)
    assert sink is not None
    if cluster is not None:
        on_ray.refuse(job, options.chunk_size, None)
    workers = on_ray.worker_count(cluster, options.call) if cluster is not None else 0
    names = names_of(job, options, False) if cluster is None else ()
    room = options.budget.on(torch.device("cpu")) if cluster is None else None
    if room is not None:  # half of it for the units in the making: one for each lane, and one more
        room //= 2 * (len(names) + 1)
    unit = storing.unit_of(job, options.chunk_size, _resumed(options), workers, room)
    job = on.job = dataclasses.replace(job, unit=unit)
    cut = split_of(job, on, names, options, False) if cluster is None else None
    refusal = None if cut is None else refusal_of(cut)
    if refusal is not None:
        raise errors.OverBudget(f"{options.call}: {refusal}")
    store = _created(sink, job, unit, options, structure)
    if compute is not None:
        compute(store)
    elif cut is not None:
        local.run(job, cut, on, store)
    elif cluster is not None:
        on_ray.run(job, options.chunk_size, cluster, options.budget, store)
    return store


def _resumed(options: Options) -> Sink | None:
    return options.out if options.resume else None


def _created(
    sink: Sink, job: Job, unit: int, options: Options, structure: pytree.TreeSpec
) -> Store:
    columns = out_edges.output_names(structure)
    specs = tuple(
        [OutputSpec(name, o.shape, o.dtype) for name, o in zip(columns, job.outputs, strict=True)]
    )
    attributes = {"call": options.call, "torch": torch.__version__}
    header = Header(job.samples, unit, specs, storing.identity(job, unit), attributes)
    return sink.create(header, resume=options.resume)


WINDOW_BYTES = 256 << 20
"""Results that are gathered at a time where samples are computed group by group."""


def groups_into_store(
    job: Job,
    options: Options,
    structure: pytree.TreeSpec,
    cluster: on_ray.Ray,
    compute: Callable[[int, int], list[torch.Tensor]],
) -> Store:
    """Compute what the store lacks where samples are computed group by group, on a cluster.

    Groups do not follow the order of the store: the results of some units at a time are gathered
    here and written.

    Args:
        job: The whole call.
        options: The call's.
        structure: Of what the function returns.
        cluster: Where it is computed.
        compute: Computes the outputs of the samples from one number to another, in order.
    """
    sink = options.out
    assert sink is not None
    refuse_store(job, options, False)
    workers = on_ray.worker_count(cluster, options.call)
    row = max(1, sum(o.sample_bytes for o in job.outputs))
    room = options.budget.on(torch.device("cpu"))
    most = WINDOW_BYTES if room is None else min(WINDOW_BYTES, room // 2)
    unit = storing.unit_of(job, options.chunk_size, _resumed(options), workers, most)
    store = _created(sink, job, unit, options, structure)
    waiting = list(store.missing())
    while waiting:
        units = [waiting.pop(0)]
        while waiting and waiting[0] == units[-1] + 1 and (len(units) + 1) * unit * row <= most:
            units.append(waiting.pop(0))
        first, stop = store.header.rows(units[0])[0], store.header.rows(units[-1])[1]
        columns = compute(first, stop)
        for number in units:
            start, end = store.header.rows(number)
            rows = [t[start - first : end - first].cpu() for t in columns]
            store.commit(store.write(number, rows))
    store.finish()
    return store
