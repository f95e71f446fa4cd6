"""Samples of unequal shapes: sentences, graphs, point clouds.

They are mapped over as a list of tensors, without padding.

Samples of one shape are stacked and mapped together, group by group, so that each sample is
computed without the others: no padding enters its numbers, and none costs time. Results go back
in the order of the samples: stacked where their shapes are equal, as a `Ragged` where they are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardmap import errors
from shardmap import reduce as reductions
from shardmap._torch import pytree, version_of
from shardmap.call import arguments as edges
from shardmap.call import outputs as out_edges
from shardmap.call.options import Options
from shardmap.trace.batch import Batch, flatten_outputs, unflatten_outputs
from shardmap.trace.container_protocol import is_container
from shardmap.trace.containers import open_batch, refuse_unequal

COMBINED = ("sum", "mean", "max", "min")
"""Reductions whose results for groups can be combined whatever the order of the samples."""


class Ragged:
    """A batch whose samples have different shapes.

    Pass it to a mapped function as any batch, with in_dim 0. The function is recorded once for each
    shape among the samples, which takes milliseconds: of a thousand shapes, pad some to a common
    one. Sums and means of half precision are rounded once for each shape, too.

    Args:
        samples: One tensor per sample, all of one dtype and on one device.

    Raises:
        OptionError: The samples are no such list.

    Example:
        >>> import torch, shardmap
        >>> words = shardmap.Ragged([torch.tensor(w) for w in ([3., 4.], [1., 2., 2.], [0., 1.])])
        >>> shardmap.vmap(torch.linalg.vector_norm)(words)
        tensor([5., 3., 1.])
        >>> shardmap.vmap(torch.cumsum, in_dims=(0, None))(words, 0)
        Ragged(3 samples of torch.float32: 2 x [2], 1 x [3])
    """

    def __init__(self, samples: Sequence[Tensor]):
        if isinstance(samples, Tensor) or not isinstance(samples, Sequence):
            raise errors.OptionError(
                f"shardmap.Ragged: samples is a {type(samples).__name__}; pass a list with a "
                "tensor for each sample, or a tensor as it is"
            )
        for number, sample in enumerate(samples):
            if (
                not isinstance(sample, Tensor)
                or sample.layout is not torch.strided
                or sample.is_nested
            ):
                found = (
                    f"a tensor of layout {sample.layout}"
                    if isinstance(sample, Tensor)
                    else f"a {type(sample).__name__}"
                )
                raise errors.OptionError(
                    f"shardmap.Ragged: sample {number} is {found}; pass a dense tensor for each "
                    "sample"
                )
            if (sample.dtype, sample.device) != (samples[0].dtype, samples[0].device):
                raise errors.OptionError(
                    f"shardmap.Ragged: sample {number} is of {sample.dtype} on {sample.device}, "
                    f"sample 0 of {samples[0].dtype} on "
                    f"{samples[0].device}; bring all to one dtype and one device"
                )
        self.samples: tuple[Tensor, ...] = tuple(samples)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        """One sample."""
        return self.samples[index]

    def __iter__(self) -> Iterator[Tensor]:
        """The samples in order."""
        return iter(self.samples)

    def __repr__(self) -> str:
        if not self.samples:
            return "Ragged(no samples)"
        counts: dict[tuple[int, ...], int] = {}
        for sample in self.samples:
            counts[tuple(sample.shape)] = counts.get(tuple(sample.shape), 0) + 1
        shapes = [f"{count} x {list(shape)}" for shape, count in sorted(counts.items())]
        shown = shapes if len(shapes) <= 4 else [*shapes[:2], "...", shapes[-1]]
        return f"Ragged({len(self.samples)} samples of {self.samples[0].dtype}: {', '.join(shown)})"


def among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if a call has a ragged argument."""
    if not kwargs and all(isinstance(leaf, Tensor) for leaf in args):  # flattening takes longer
        return False
    return any(isinstance(leaf, Ragged) for leaf in pytree.tree_leaves((args, kwargs)))


def refuse_plan(args: tuple[Any, ...], kwargs: dict[str, Any], call: str) -> None:
    """Refuse to plan a call with ragged arguments.

    Raises:
        OptionError: There are some.
    """
    if among(args, kwargs):
        raise errors.OptionError(
            f"{call}: an argument is a shardmap.Ragged, of which each shape is a map with a plan "
            "of its own; plan it for samples of one "
            "shape, stacked"
        )


def run(
    map_group: Callable[[Batch], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
) -> Any:
    """Map over samples of unequal shapes, group by group.

    Args:
        map_group: Function that maps over samples of equal shapes, and returns their results,
            reduced as `options` say.
        args: The call's arguments, some of them `Ragged`.
        kwargs: Its keyword arguments, likewise.
        options: The call's options.

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
    whole, given = _whole(args, kwargs, options)
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for row in range(whole.size):
        groups.setdefault(tuple([samples[row].shape for samples in given.values()]), []).append(row)
    structure, found = None, []
    for rows in groups.values():
        batch = _group(whole, given, rows)
        versions = [version_of(batch.leaves[leaf]) for leaf in given]
        result = map_group(batch)
        if versions != [version_of(batch.leaves[leaf]) for leaf in given]:
            raise errors.CapturedWriteError(
                f"{options.call}: the function writes in place to a shardmap.Ragged argument, of "
                "which it is given copies; clone the "
                "argument inside the function"
            )
        leaves, shape = _flat(result, options)
        if structure is not None and shape != structure:
            raise errors.OutputError(
                f"{options.call}: the function returns {shape} for samples of one shape and "
                f"{structure} for those of another; return the "
                "same structure for all"
            )
        structure = shape
        found.append(leaves)
    assert structure is not None  # there are samples, and so there is a group
    return joined(found, list(groups.values()), structure, options)


def joined(
    found: Sequence[Sequence[Tensor]],
    groups: list[list[int]],
    structure: pytree.TreeSpec,
    options: Options,
) -> Any:
    """Combine the results of groups of samples into those of all samples.

    Args:
        found: For each group, its outputs, flat: stacked, or reduced as `options` say.
        groups: The numbers of its samples.
        structure: Structure of the function's result.
        options: The call's options.

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


def _flat(result: object, options: Options) -> tuple[list[Tensor], pytree.TreeSpec]:
    """The results of one group, and the structure of one sample's."""
    parts, structure = pytree.tree_flatten(result, is_leaf=is_container)
    if any(map(is_container, parts)):
        how = out_edges.spread_reductions(options.reduce, structure, options.call)
        for i, (part, reduction) in enumerate(zip(parts, how, strict=True)):
            if is_container(part) and reduction is None:
                parts[i] = open_batch(part, 0)[0]
        result = pytree.tree_unflatten(parts, structure)
    return flatten_outputs(result, options.call)


def refuse_groups(options: Options, what: str, why: str) -> None:
    """Refuse options that cannot be served group by group.

    Args:
        options: The call's options.
        what: Text for the argument or function that makes the groups.
        why: Text for the property by which samples are grouped.

    Raises:
        OptionError: The message names the option.
    """
    call = options.call
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
    if options.randomness == "same":
        raise errors.OptionError(
            f"{call}: randomness='same' and {what}: samples of different groups cannot share a "
            "draw; draw outside of the function and pass it, or use randomness='different'"
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
    args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
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
        leaves[i] = (
            samples[0].new_empty(1).expand(len(samples), *[1] * samples[0].ndim)
        )  # sizes and dims are checked with it
    stand_ins, keywords = pytree.tree_unflatten(leaves, structure)
    whole = edges.collect(stand_ins, keywords, options.in_dims, options.kw_in_dims, call)
    dims = dict(whole.mapped)
    for i in given:
        if dims.get(i) != 0:
            raise errors.InDimsError(
                f"{call}: a shardmap.Ragged argument has in_dim {dims.get(i)}; it can only be "
                "mapped over its samples: give it in_dim 0"
            )
    if whole.columns:
        raise errors.OptionError(
            f"{call}: a shardmap.Ragged argument together with a column of a source; read the "
            "column first: column.read(0, len(column))"
        )
    return whole, given


def _group(whole: Batch, given: dict[int, Ragged], rows: list[int]) -> Batch:
    """The batch of some samples, whose shapes are equal."""
    leaves = list(whole.leaves)
    for leaf, dim in whole.mapped:
        if leaf in given:
            # Outside of inference mode, whose tensors do not count writes.
            with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
                leaves[leaf] = torch.stack([given[leaf][row] for row in rows])
        else:
            leaves[leaf] = leaves[leaf].index_select(
                dim, torch.tensor(rows, device=leaves[leaf].device)
            )
    return dataclasses.replace(whole, leaves=leaves, size=len(rows))


def as_asked(rows: list[Tensor], ragged: str) -> Any:
    """One output of all samples: stacked if the shapes are equal, else as `ragged` says."""
    if all(t.shape == rows[0].shape for t in rows):
        return torch.stack(rows)
    if ragged == "error":
        return Ragged(rows)
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged) if ragged == "nested" else rows


def _joined(
    parts: list[Tensor],
    groups: list[list[int]],
    reduction: reductions.Reduction | None,
    options: Options,
) -> Any:
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
        return as_asked([by_row[row] for row in range(len(by_row))], options.ragged)
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
