"""The results of a mapped call: where the samples go in each, how it is reduced, and its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardmap import errors
from shardmap import reduce as reductions
from shardmap._torch import pytree
from shardmap.call.arguments import spec_text, spread
from shardmap.trace.containers import Opened, contains, is_opened, joined


def spread_reductions(reduce: Any, tree: Any, call: str) -> list[reductions.Reduction | None]:
    """One reduction, or None, per output.

    Args:
        reduce: As the user gave it: a reduction for all outputs, or a prefix of their structure.
        tree: The outputs' structure.
        call: The user's call, for errors.

    Raises:
        OptionError: It does not fit the structure, or holds something that is no reduction.
    """
    if reductions.is_one(reduce):
        return [reductions.parse(reduce, call)] * len(pytree.tree_leaves(tree))
    flat: list[reductions.Reduction | None] = []

    def descend(given: Any, part: Any) -> None:
        if reductions.is_one(given):
            flat.extend([reductions.parse(given, call)] * len(pytree.tree_leaves(part)))
            return
        if isinstance(given, dict) and isinstance(part, dict) and set(given) == set(part):
            for key in part:
                descend(given[key], part[key])
            return
        if (
            isinstance(given, tuple | list)
            and isinstance(part, tuple | list)
            and len(given) == len(part)
        ):
            for g, p in zip(given, part, strict=True):
                descend(g, p)
            return
        if not isinstance(given, dict | tuple | list):
            reductions.parse(given, call)
        raise errors.OptionError(
            f"{call}: reduce={reduce!r} does not fit the outputs {spec_text(tree)}; pass one "
            "reduction for all, or the same structure "
            "(or a prefix of it)"
        )

    descend(reduce, tree)
    return flat


def place_outputs(
    ndims: list[int],
    mapped: list[bool],
    structure: pytree.TreeSpec,
    out_dims: Any,
    call: str,
    reduced: Sequence[reductions.Reduction | None] = (),
) -> list[int | None]:
    """Where the mapped dimension goes in each result: one dimension per output, never negative.

    None for an unmapped result. The tensors of a container have the samples first, whatever
    `out_dims` says of the container: see `result_dims`.

    Args:
        ndims: Dimensions of each output for one sample.
        mapped: Whether each differs by sample.
        structure: Their pytree.
        out_dims: As the user gave it.
        call: The user's call, for errors.
        reduced: The outputs' reductions: a reduced output has no dimension of samples, whatever
            `out_dims` says of it.

    Raises:
        OutDimsError: `out_dims` does not fit.
    """
    reduced = reduced or [None] * len(ndims)
    if out_dims == 0 and type(out_dims) is int:
        return [0 if r is None else None for r in reduced]
    tree = pytree.tree_unflatten(ndims, structure)
    dims = spread(_of_one(out_dims, structure), tree, call, "out_dims", errors.OutDimsError)
    ndims, whose = _counted(tree, ndims)
    placed: list[int | None] = []
    for ndim, owned, differs, d, reduction in zip(ndims, whose, mapped, dims, reduced, strict=True):
        if d is None or reduction is not None:
            if differs and reduction is None:
                raise errors.OutDimsError(
                    f"{call}: out_dims={out_dims!r} gives None for an output that differs by "
                    "sample; give it an int"
                )
            placed.append(None)
            continue
        if not -ndim - 1 <= d <= ndim:
            raise errors.OutDimsError(
                f"{call}: an output has {ndim} dimensions for one sample, out_dim {d} is out of "
                f"range; use {-ndim - 1} to {ndim}"
            )
        placed.append(0 if owned else d % (ndim + 1))
    return placed


def result_dims(
    structure: pytree.TreeSpec, out_dims: object, placed: Sequence[int | None], call: str
) -> Sequence[int | None]:
    """Where the dimension of samples goes in each result; of a container's tensor, in that.

    Args:
        structure: The outputs' pytree.
        out_dims: As the user gave it.
        placed: As `place_outputs` returned it.
        call: The user's call, for errors.
    """
    if out_dims == 0 or not contains(structure, Opened):
        return placed
    tree = pytree.tree_unflatten([0] * len(placed), structure)
    dims = spread(_of_one(out_dims, structure), tree, call, "out_dims", errors.OutDimsError)
    ndims, whose = _counted(tree, [0] * len(placed))
    found = zip(placed, dims, ndims, whose, strict=True)
    return [d % (ndim + 1) if owned and p is not None else p for p, d, ndim, owned in found]


def _of_one(out_dims: object, structure: pytree.TreeSpec) -> object:
    """`out_dims`, or its only entry where the function returns one tensor or container."""
    single = structure.is_leaf() or structure.type is Opened
    if isinstance(out_dims, tuple | list) and len(out_dims) == 1 and single:
        return out_dims[0]
    return out_dims


def _counted(tree: object, ndims: list[int]) -> tuple[list[int], list[bool]]:
    """The dimensions that an out_dim of each output counts, and whether a container holds it.

    Of a container, those of its batch.
    """
    parts = pytree.tree_leaves(tree, is_leaf=is_opened)
    counted: list[int] = []
    whose: list[bool] = []
    for part in parts:
        count = len(part.leaves) if is_opened(part) else 1
        at = len(counted)
        counted += [part.layout.ndim] * count if is_opened(part) else ndims[at : at + 1]
        whose += [is_opened(part)] * count
    return counted, whose


def output_names(structure: pytree.TreeSpec) -> list[str]:
    """A name for each output: its keys, joined by dots.

    `result` where the function returns one tensor.
    """
    tree = pytree.tree_unflatten([0] * structure.num_leaves, structure)
    return [joined(path) or "result" for path, _ in pytree.tree_flatten_with_path(tree)[0]]
