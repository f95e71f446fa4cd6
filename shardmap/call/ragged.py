"""Samples of unequal shapes: sentences, graphs, point clouds.

A list of tensors that is mapped over, without padding.

Samples of one shape are stacked and mapped together, group by group, so that each sample is
computed as by itself: no padding takes part in its numbers, and none is paid for. Results go back
in the order of the samples: stacked where their shapes are equal, as a `Ragged` where they are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardmap import errors
from shardmap import reduce as reductions
from shardmap._torch import pytree, version_of
from shardmap.call import arguments as edges
from shardmap.call import outputs as out_edges
from shardmap.call.options import Options
from shardmap.store.columns import Column
from shardmap.store.ragged import PickedColumn, Ragged
from shardmap.trace.batch import Batch, flatten_outputs, unflatten_outputs
from shardmap.trace.container_protocol import is_container
from shardmap.trace.containers import open_batch, refuse_unequal
from shardmap.trace.key_order import positions

COMBINED = ("sum", "mean", "max", "min")
"""Reductions whose results for groups can be combined whatever the order of the samples."""


def given(
    args: tuple[object, ...], kwargs: dict[str, object], options: Options
) -> tuple[tuple[object, ...], dict[str, object], bool]:
    """A call's arguments, and whether some of them are ragged.

    A nested tensor becomes a `Ragged`, and so does a list of tensors whose first sizes differ: as a
    pytree of batches it would have no one size.
    """
    if not kwargs and all(isinstance(leaf, Tensor) and not leaf.is_nested for leaf in args):
        return args, kwargs, False  # flattening takes longer
    dims = options.in_dims
    if isinstance(dims, list | tuple):
        of_args = dims if len(dims) == len(args) else (None,) * len(args)
    else:
        of_args = (dims,) * len(args)
    args = tuple([_as_ragged(a, d) for a, d in zip(args, of_args, strict=True)])
    own = options.kw_in_dims
    kwargs = {
        name: _as_ragged(value, own.get(name) if isinstance(own, dict) else own)
        for name, value in kwargs.items()
    }
    return args, kwargs, any(isinstance(t, Ragged) for t in pytree.tree_leaves((args, kwargs)))


def _as_ragged(value: object, dim: object) -> object:
    if type(dim) is not int or dim != 0:
        return value
    if isinstance(value, Tensor):
        return Ragged(value.unbind()) if value.is_nested else value
    return Ragged(value) if type(value) is list and _is_unequal(value) else value


def _is_unequal(values: list[object]) -> bool:
    """True if a list holds samples of unequal lengths, and no batches."""
    tensors = [t for t in values if isinstance(t, Tensor) and not t.is_nested]
    if len(tensors) < max(2, len(values)):
        return False
    kinds = {(t.ndim, t.dtype, t.device) for t in tensors}
    sizes = {t.shape[0] for t in tensors if t.ndim}
    return len(kinds) == 1 and len(sizes) > 1


def grouped(
    args: tuple[object, ...], kwargs: dict[str, object], options: Options
) -> list[tuple[list[int], Batch]]:
    """The samples of each shape: the numbers of the rows, ascending, and the batch of them.

    Raises:
        OptionError: An option cannot be served for samples of several shapes.
        InDimsError: A ragged argument is not mapped over its samples, or the sizes disagree.
        EmptyBatchError: There are no samples.
    """
    refuse_groups(options, "a shardmap.Ragged argument", "shape", whole=True)
    whole, ragged = _whole(args, kwargs, options)
    return [(rows, _group(whole, ragged, rows)) for rows in _rows(whole, ragged)]


def _rows(whole: Batch, ragged: dict[int, Ragged]) -> list[list[int]]:
    """The numbers of the samples of each shape."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    shapes = [samples.shapes for samples in ragged.values()]
    for row in range(whole.size):
        groups.setdefault(tuple([own[row] for own in shapes]), []).append(row)
    return list(groups.values())


def reduction_names(options: Options) -> set[str]:
    """The names of a call's reductions."""
    entries = pytree.tree_leaves(options.reduce, is_leaf=reductions.is_one)
    parsed = [reductions.parse(entry, options.call) for entry in entries]
    return {reduction.name for reduction in parsed if reduction is not None}


def is_whole(options: Options) -> bool:
    """True if a call is one map over all shapes, and not one for each.

    What is added up is so for each shape: the sum can be had without its terms.
    """
    names = reduction_names(options)
    return not names or not names <= set(COMBINED)


def run(
    map_group: Callable[[Batch], object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    options: Options,
) -> object:
    """Map over samples of unequal shapes, group by group.

    Args:
        map_group: Maps over a batch of samples of equal shapes, and returns their results, reduced
            as `options` say.
        args: The call's arguments, some of them `Ragged`.
        kwargs: Its keyword arguments, likewise.
        options: Those of the call.

    Returns:
        The results in the order of the samples, or reduced.

    Raises:
        OptionError: An option cannot be served group by group.
        InDimsError: A ragged argument is not mapped over its samples, or the sizes disagree.
        EmptyBatchError: There are no samples.
        CapturedWriteError: The function writes in place to a ragged argument.
        OutputError: Results of different groups do not fit together.
    """
    refuse_groups(options, "a shardmap.Ragged argument", "shape")
    whole, ragged = _whole(args, kwargs, options)
    groups = _rows(whole, ragged)
    structure, found = None, []
    for rows in groups:
        batch = _group(whole, ragged, rows)
        versions = [_version(batch.leaves[leaf]) for leaf, _ in batch.mapped]
        result = map_group(batch)
        if versions != [_version(batch.leaves[leaf]) for leaf, _ in batch.mapped]:
            raise errors.CapturedWriteError(
                f"{options.call}: the function writes in place to a mapped argument of a call with "
                "a shardmap.Ragged argument, of which it is given copies; clone the argument "
                "inside the function"
            )
        leaves, shape = flat(result, options)
        order = positions(shape, structure or shape)
        if order is None:
            raise errors.OutputError(
                f"{options.call}: the function returns {shape} for samples of one shape and "
                f"{structure} for those of another; return the "
                "same structure for all"
            )
        structure = structure or shape
        found.append([leaves[k] for k in order])
    assert structure is not None  # there are samples, and so there is a group
    return joined(found, groups, structure, options)


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else version_of(t)


def joined(
    found: Sequence[Sequence[Tensor]],
    groups: list[list[int]],
    structure: pytree.TreeSpec,
    options: Options,
) -> object:
    """The results of all samples, from those of groups of them.

    Args:
        found: For each group, its outputs, flat: stacked, or reduced as `options` say.
        groups: The numbers of its samples.
        structure: Of what the function returns.
        options: The call's.

    Raises:
        OutputError: Results of different groups do not fit together.
    """
    how = out_edges.spread_reductions(options.reduce, structure, options.call)
    outputs = [
        _joined([leaves[i] for leaves in found], groups, how[i], options)
        for i in range(structure.num_leaves)
    ]
    refuse_unequal(outputs, structure, options.call)
    dims = [0 if reduction is None else None for reduction in how]
    return unflatten_outputs(outputs, structure, dims, sum(map(len, groups)))


def flat(result: object, options: Options) -> tuple[list[Tensor], pytree.TreeSpec]:
    """The results of one group, and the structure of one sample's."""
    parts, structure = pytree.tree_flatten(result, is_leaf=is_container)
    if any(map(is_container, parts)):
        how = out_edges.spread_reductions(options.reduce, structure, options.call)
        for i, (part, reduction) in enumerate(zip(parts, how, strict=True)):
            if is_container(part) and reduction is None:
                parts[i] = open_batch(part, 0)[0]
        result = pytree.tree_unflatten(parts, structure)
    return flatten_outputs(result, options.call)


def refuse_groups(options: Options, what: str, why: str, whole: bool = False) -> None:
    """Refuse what cannot be had group by group.

    Args:
        options: The call's.
        what: What makes the groups.
        why: By what samples are grouped.
        whole: Whether one map over all groups puts results where they belong.

    Raises:
        OptionError: The message names the option.
    """
    call = options.call
    if options.randomness == "same":
        raise errors.OptionError(
            f"{call}: randomness='same' and {what}: samples of different groups cannot share a "
            "draw; draw outside of the function and pass it, or use randomness='different'"
        )
    if whole:
        return
    if options.out is not None:
        raise errors.OptionError(
            f"{call}: out= and {what}, which is computed group by group, and not row by row as a "
            "store is written; leave out= away"
        )
    if options.out_dims != 0:
        raise errors.OptionError(
            f"{call}: out_dims={options.out_dims!r} and {what}, whose results may be ragged; leave "
            "out_dims at 0"
        )
    for given in pytree.tree_leaves(options.reduce, is_leaf=reductions.is_one):
        reduction = reductions.parse(given, call)
        if reduction is not None and reduction.name not in COMBINED:
            raise errors.OptionError(
                f"{call}: reduce={reduction.name!r} and {what}: samples are grouped by {why}, and "
                "this reduction takes them all at once, in order; stack the results, or reduce by "
                f"{', '.join(COMBINED)}"
            )


def _whole(
    args: tuple[object, ...], kwargs: dict[str, object], options: Options
) -> tuple[Batch, dict[int, Ragged]]:
    """The batch of all samples with stand-ins for ragged arguments, and those by their position."""
    call = options.call
    leaves, structure = pytree.tree_flatten((args, kwargs), is_leaf=is_container)
    given = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Ragged)}
    for i, samples in given.items():
        if len(samples) == 0:
            raise errors.EmptyBatchError(
                f"{call}: a shardmap.Ragged argument has no samples, so the shape of a result "
                "cannot be inferred"
            )
        first = samples[0]  # sizes and dims are checked with what stands for it
        leaves[i] = first.new_empty(1).expand(len(samples), *[1] * first.ndim)
    stand_ins, keywords = pytree.tree_unflatten(leaves, structure)
    whole = edges.collect(stand_ins, keywords, options.in_dims, options.kw_in_dims, call)
    dims = dict(whole.mapped)
    for i in given:
        if dims.get(i) != 0:
            raise errors.InDimsError(
                f"{call}: a shardmap.Ragged argument has in_dim {dims.get(i)}; it can only be "
                "mapped over its samples: give it in_dim 0"
            )
    return whole, given


def _group(whole: Batch, ragged: dict[int, Ragged], rows: list[int]) -> Batch:
    """The batch of some samples, whose shapes are equal."""
    leaves = list(whole.leaves)
    columns: dict[int, Column] = {}
    for position, (leaf, dim) in enumerate(whole.mapped):
        if leaf in ragged or position in whole.columns:
            # Outside of inference mode, whose tensors count no writes.
            with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
                found = (
                    ragged[leaf].rows(rows)
                    if leaf in ragged
                    else PickedColumn(whole.columns[position], rows)
                )
            if isinstance(found, Column):
                columns[position] = found
                found = found.rows_between(0, min(edges.HEAD, len(rows)))
            leaves[leaf] = found
        else:
            leaves[leaf] = leaves[leaf].index_select(
                dim, torch.tensor(rows, device=leaves[leaf].device)
            )
    return dataclasses.replace(whole, leaves=leaves, size=len(rows), columns=columns)


def as_asked(rows: list[Tensor], ragged: str, call: str) -> object:
    """One output of all samples: stacked where the shapes are equal, else as `ragged` says.

    Raises:
        RaggedError: A nested tensor was asked for, which has one ragged dimension only.
    """
    if all(t.shape == rows[0].shape for t in rows):
        return torch.stack(rows)
    if ragged == "error":
        return Ragged(rows)
    if ragged == "list":
        return rows
    shapes = {tuple(t.shape) for t in rows}
    ndims = {len(shape) for shape in shapes}
    unequal = [len(set(sizes)) > 1 for sizes in zip(*shapes, strict=False)]
    if len(ndims) > 1 or sum(unequal) > 1:
        first, other = list(rows[0].shape), next(list(s) for s in shapes if s != rows[0].shape)
        raise errors.RaggedError(
            f"{call}: ragged='nested' and results of shapes {first} and {other}: a nested tensor "
            "has one ragged dimension; pass ragged='list'"
        )
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _joined(
    parts: list[Tensor],
    groups: list[list[int]],
    reduction: reductions.Reduction | None,
    options: Options,
) -> object:
    """One output of all samples, from those of the groups."""
    call = options.call
    if reduction is None:
        if all(part.shape[1:] == parts[0].shape[1:] for part in parts):
            rows = torch.tensor([row for rows in groups for row in rows], device=parts[0].device)
            return torch.cat(parts).index_select(0, rows.argsort())
        by_row = {
            row: result
            for rows, part in zip(groups, parts, strict=True)
            for row, result in zip(rows, part.unbind(0), strict=True)
        }
        return as_asked([by_row[row] for row in range(len(by_row))], options.ragged, options.call)
    if any(part.shape != parts[0].shape for part in parts):
        shapes = sorted({tuple(part.shape) for part in parts})
        raise errors.OutputError(
            f"{call}: reduce={reduction.name!r} of results of shapes {shapes[0]} and {shapes[-1]}; "
            "return results of one shape, or reduce "
            "over the unequal dimension inside the function"
        )
    every = torch.stack(parts)
    if reduction.name in ("max", "min"):
        return every.amax(0) if reduction.name == "max" else every.amin(0)
    if not (every.is_floating_point() or every.is_complex()):
        return every.sum(0)
    wide = every.to(torch.complex128 if every.is_complex() else torch.float64)
    if reduction.name == "mean":
        sizes = torch.tensor(
            [len(rows) for rows in groups], dtype=torch.float64, device=every.device
        )
        wide = wide * (sizes / sizes.sum()).view(-1, *[1] * (every.ndim - 1))
    return wide.sum(0).to(every.dtype)
