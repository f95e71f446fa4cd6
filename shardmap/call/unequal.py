"""Calls over samples of unequal shapes: by one map, or by one for each shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from shardmap import errors
from shardmap._torch import pytree
from shardmap.call import ragged
from shardmap.call.by_shape import ByShape
from shardmap.call.execute import run_map
from shardmap.call.job import names_of, split_of
from shardmap.call.memo import Memory
from shardmap.call.options import Options
from shardmap.call.planned import Plan
from shardmap.call.shapes import ShapesOfCall
from shardmap.call.surroundings import surroundings
from shardmap.run import prepare
from shardmap.run import ray as on_ray
from shardmap.trace.batch import flatten_outputs, unflatten_outputs
from shardmap.trace.containers import refuse_unequal
from shardmap.trace.key_order import positions
from shardmap.trace.traced import is_traced


def run_by_shape(
    func: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    options: Options,
    memory: Memory | None,
) -> object:
    """One call of a mapped function over samples of unequal shapes."""
    around = surroundings()
    cluster = None if around.inlined else on_ray.asked_for(options.devices)
    alone = around.plain and not is_traced(pytree.tree_leaves((args, kwargs)))
    whole = ragged.is_whole(options)
    if cluster is not None:  # what is folded is so by a function that does not travel
        whole = options.out is not None or ragged.reduction_names(options) == {"gram"}
    if alone and whole:
        try:
            return _whole(func, args, kwargs, options, memory, cluster)
        except errors.VariesError as error:
            if options.out is not None:
                raise
            if isinstance(error, errors.RaggedError):
                if options.ragged == "error" or options.reduce is not None:
                    raise
                return _listed(func, args, kwargs, options)
    shapes = ShapesOfCall(func, memory, options.randomness, options.call)
    result = ragged.run(lambda batch: run_map(func, batch, options, shapes), args, kwargs, options)
    shapes.finish()
    return result


def _listed(
    func: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    options: Options,
) -> object:
    """Results whose shapes follow from values, shape by shape, in the samples' order.

    Raises:
        OutputError: The function returns another structure for some samples.
    """
    structures: list[pytree.TreeSpec] = []

    def outputs(*own: object, **named: object) -> tuple[torch.Tensor, ...]:
        leaves, structure = flatten_outputs(func(*own, **named), options.call)
        structures.append(structure)
        order = positions(structure, structures[0])
        if order is None:
            raise errors.OutputError(
                f"{options.call}: the function returns {structure} for one sample and "
                f"{structures[0]} for another; return the same structure for all"
            )
        return tuple([leaves[k] for k in order])

    listed, found = dataclasses.replace(options, ragged="list"), dict[int, list[torch.Tensor]]()
    for rows, batch in ragged.grouped(args, kwargs, options):
        columns = run_map(outputs, batch, listed, None)
        found |= zip(rows, map(list, zip(*columns, strict=True)), strict=True)
    structure, size = structures[0], len(found)
    results = [
        ragged.as_asked([found[row][k] for row in range(size)], options.ragged, options.call)
        for k in range(structure.num_leaves)
    ]
    refuse_unequal(results, structure, options.call)
    return unflatten_outputs(results, structure, [0] * len(results), size)


def _whole(
    func: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    options: Options,
    memory: Memory | None,
    cluster: on_ray.Ray | None,
) -> object:
    around, found = surroundings(), ragged.grouped(args, kwargs, options)
    shapes = ShapesOfCall(func, memory, options.randomness, options.call)
    if options.out is not None:
        shapes.record_all()  # what is written cannot be taken back
    try:
        return ByShape(func, found, options, around, shapes, cluster is not None).run(cluster)
    except errors.StaleRecordingError:
        shapes.record_all()
        return ByShape(func, found, options, around, shapes, cluster is not None).run(cluster)


def planned_by_shape(
    func: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    options: Options,
    finished: Callable[[object], object],
) -> Plan:
    """The plan of a call over samples of unequal shapes.

    Raises:
        OptionError: The call is for a cluster.
        RaggedError: Results have unequal shapes.
    """
    call = options.call
    if on_ray.asked_for(options.devices) is not None:
        raise errors.OptionError(
            f"{call}: a plan for devices={options.devices!r} of samples of unequal shapes, which "
            "are handed to the cluster shape by shape; plan it for this machine, devices='auto', "
            "or call the mapped function"
        )
    shapes = ShapesOfCall(func, None, options.randomness, call)
    shapes.record_all()
    found = ByShape(func, ragged.grouped(args, kwargs, options), options, surroundings(), shapes)
    found.refuse_unequal("a plan is of equal results,")
    job = found.job(scattered=not found.folds)
    on = prepare.Devices(job, options.budget.on)
    cut = split_of(job, on, names_of(job, options, False), options, False, always=True)

    def finish(outputs: list[torch.Tensor]) -> object:
        return finished(found.finish(outputs, job))

    return Plan(job, cut, on, options, finish, [], shapes=found.described())
