"""The results of a mapped call: position of the mapped dimension, reduction, and name of each."""

from __future__ import annotations

import dataclasses
from collections import defaultdict, namedtuple
from collections.abc import Sequence
from typing import Any

from shardmap import errors
from shardmap import reduce as reductions
from shardmap._torch import pytree
from shardmap.call.arguments import broadcast, spec_text, spread
from shardmap.trace.batch import Subclassed
from shardmap.trace.containers import Opened, contains


def spread_reductions(
    reduce: object, structure: pytree.TreeSpec, call: str
) -> list[reductions.Reduction | None]:
    """One reduction, or None, per output.

    Args:
        reduce: The user's option: a reduction for all outputs, or a prefix of their structure.
        structure: The outputs' structure.
        call: The user's call, for errors.

    Raises:
        OptionError: It does not fit the structure, or holds something that is no reduction.
    """
    if reductions.is_one(reduce):
        return [reductions.parse(reduce, call)] * structure.num_leaves
    # Each entry is parsed once: outputs under one entry are reduced together.
    parsed = pytree.tree_map(
        lambda entry: reductions.parse(entry, call), reduce, is_leaf=reductions.is_one
    )
    flat = broadcast(parsed, structure, reductions.is_one)
    if flat is None:
        raise errors.OptionError(
            f"{call}: reduce={reduce!r} does not fit the outputs {spec_text(structure)}; pass one "
            "reduction for all, or the same structure (or a prefix of it)"
        )
    return flat


def place_outputs(
    ndims: list[int],
    mapped: list[bool],
    structure: pytree.TreeSpec,
    out_dims: Any,
    call: str,
    reduced: Sequence[reductions.Reduction | None] = (),
) -> list[int | None]:
    """Position of the mapped dimension in each result: one per output, never negative.

    None for an unmapped result. The tensors of a container have the samples first, whatever
    `out_dims` says of the container: see `result_dims`.

    Args:
        ndims: Dimensions of each output for one sample.
        mapped: For each output: True if it differs by sample.
        structure: The outputs' pytree.
        out_dims: The user's option.
        call: The user's call, for errors.
        reduced: The outputs' reductions: a reduced output has no dimension of samples, whatever
            `out_dims` says of it.

    Raises:
        OutDimsError: `out_dims` does not fit.
    """
    reduced = reduced or [None] * len(ndims)
    if out_dims == 0 and type(out_dims) is int:
        return [0 if r is None else None for r in reduced]
    given = _of_one(out_dims, structure)
    dims = spread(given, structure, call, "out_dims", errors.OutDimsError)
    ndims, whose = _counted(structure, ndims)
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
    """Position of the mapped dimension in each result; for a container's tensor, inside it.

    Args:
        structure: The outputs' pytree.
        out_dims: The user's option.
        placed: As `place_outputs` returned it.
        call: The user's call, for errors.
    """
    if out_dims == 0 or not contains(structure, Opened):
        return placed
    given = _of_one(out_dims, structure)
    dims = spread(given, structure, call, "out_dims", errors.OutDimsError)
    ndims, whose = _counted(structure, [0] * len(placed))
    found = zip(placed, dims, ndims, whose, strict=True)
    return [d % (ndim + 1) if owned and p is not None else p for p, d, ndim, owned in found]


def _of_one(out_dims: object, structure: pytree.TreeSpec) -> object:
    """`out_dims`, or its only entry if the function returns one tensor or container."""
    single = structure.is_leaf() or structure.type in (Opened, Subclassed)
    if isinstance(out_dims, tuple | list) and len(out_dims) == 1 and single:
        return out_dims[0]
    return out_dims


def _counted(structure: pytree.TreeSpec, ndims: list[int]) -> tuple[list[int], list[bool]]:
    """Number of dimensions that an out_dim of each output counts; True if a container holds it.

    For a container these are the dimensions of its batch.
    """
    if structure.type is Opened:
        count = structure.num_leaves
        return [structure.context.ndim] * count, [True] * count
    if structure.is_leaf():
        return ndims, [False]
    counted: list[int] = []
    whose: list[bool] = []
    for child in structure.children():
        at = len(counted)
        own, held = _counted(child, ndims[at : at + child.num_leaves])
        counted += own
        whose += held
    return counted, whose


def output_names(structure: pytree.TreeSpec) -> list[str]:
    """A name for each output: its keys, joined by dots.

    It is `result` if the function returns one tensor.
    """
    return [name or "result" for name in _names(structure)]


def _names(structure: pytree.TreeSpec) -> list[str]:
    if structure.is_leaf():
        return [""]
    if structure.type is Subclassed:
        return _names(structure.child(0))
    keys: Sequence[object] = range(structure.num_children)
    if structure.type is Opened:
        keys = structure.context.names
    elif isinstance(structure.type, type) and issubclass(structure.type, dict):
        keys = structure.context[1] if structure.type is defaultdict else structure.context
    elif structure.type is namedtuple:
        keys = structure.context._fields
    elif dataclasses.is_dataclass(structure.type):
        keys = structure.context[0]
    parts = zip(keys, structure.children(), strict=True)
    return [f"{key}.{name}" if name else str(key) for key, child in parts for name in _names(child)]
