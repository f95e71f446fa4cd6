"""The edges of a mapped call.

Which arguments are mapped over which dimension, and how results are put together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardmap import errors
from shardmap import reduce as reductions
from shardmap._torch import node_type, pytree
from shardmap.store.columns import Column
from shardmap.store.sources import Source
from shardmap.trace.batch import Batch

HEAD = 3
"""Rows of a source that are read when the function is recorded, tried and watched."""


def _is_leaf_dim(x: Any) -> bool:
    return x is None


def spread(
    dims: object, tree: object, call: str, name: str, error: type[errors.ShardmapError]
) -> list[Any]:
    """A prefix of `dims` over the leaves of `tree`: one entry per leaf."""
    return _spread(dims, pytree.tree_flatten(tree)[1], tree, call, name, error)


def _spread(
    dims: object,
    spec: pytree.TreeSpec,
    tree: object,
    call: str,
    name: str,
    error: type[errors.ShardmapError],
) -> list[Any]:
    flat = _broadcast(dims, spec)
    if flat is None:
        raise error(
            f"{call}: {name}={dims!r} does not fit the structure {spec_text(tree)}; {name} must be "
            "an int, None, or the same "
            "structure (or a prefix of it)"
        )
    for d in flat:
        if d is not None and (isinstance(d, bool) or not isinstance(d, int)):
            raise error(
                f"{call}: {name}={dims!r} holds {d!r}, a {type(d).__name__}; use an int or None"
            )
    return flat


def _broadcast(dims: Any, spec: pytree.TreeSpec) -> list[Any] | None:
    if spec.is_leaf():
        return None if isinstance(dims, tuple | list | dict) else [dims]
    if not isinstance(dims, tuple | list | dict):
        return [dims] * spec.num_leaves
    node, context = node_type(dims), None
    children, context = pytree.SUPPORTED_NODES[node].flatten_fn(dims)
    kinds = (
        ({tuple, list} if node in (tuple, list) else {node}) if node is not tuple else {tuple, list}
    )
    if (
        spec.type is not node
        and not (spec.type in kinds and node in kinds)
        and not (isinstance(dims, dict) and spec.type in (dict,))
    ):
        return None
    if len(children) != spec.num_children or (
        isinstance(dims, dict) and set(dims) != set(spec.context)
    ):
        return None
    if isinstance(dims, dict):
        children = [dims[k] for k in spec.context]
    out: list[Any] = []
    for child, child_spec in zip(children, spec.children(), strict=True):
        flat = _broadcast(child, child_spec)
        if flat is None:
            return None
        out += flat
    return out


def spec_text(tree: Any) -> str:
    """The structure of a pytree, with `*` for leaves."""
    return repr(pytree.tree_map(lambda _: _Star(), tree))


class _Star:
    def __repr__(self) -> str:
        return "*"


def collect(
    args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: Any, kw_in_dims: Any, call: str
) -> Batch:
    """The batch that a call's arguments make.

    Raises:
        InDimsError: `in_dims` does not fit, sizes disagree, or nothing is mapped.
    """
    if not args and kw_in_dims is None:
        raise errors.InDimsError(
            f"{call}: called without positional arguments, so there is nothing to map over; "
            "keyword arguments are shared by all "
            "samples unless "
            "kw_in_dims maps them"
        )
    if isinstance(in_dims, list):
        in_dims = tuple(in_dims)
    if not (in_dims is None or isinstance(in_dims, int | tuple)):
        raise errors.InDimsError(
            f"{call}: in_dims={in_dims!r} is a {type(in_dims).__name__}; pass an int, None, or a "
            "tuple with one entry per argument"
        )
    if isinstance(in_dims, tuple) and len(in_dims) != len(args):
        raise errors.InDimsError(
            f"{call}: in_dims={in_dims!r} has {len(in_dims)} entries for {len(args)} positional "
            "arguments; give one entry per "
            "argument, or one int for all"
        )
    if not kwargs and all(type(arg) is torch.Tensor for arg in args):
        leaves, structure = [*args], _of_leaves(len(args))
    else:
        leaves, structure = pytree.tree_flatten((args, kwargs))
    of_args, of_kwargs = structure.children()
    dims = _spread(in_dims, of_args, args, call, "in_dims", errors.InDimsError)
    if kw_in_dims is None:
        dims += [None] * of_kwargs.num_leaves
    elif isinstance(kw_in_dims, dict):
        unknown = sorted(set(kw_in_dims) - set(kwargs))
        if unknown:
            raise errors.InDimsError(
                f"{call}: kw_in_dims={kw_in_dims!r} names {unknown[0]!r}, which was not passed; "
                f"the keyword arguments are {sorted(kwargs)}"
            )
        for key, value in kwargs.items():
            dims += spread(
                kw_in_dims.get(key), value, call, f"kw_in_dims[{key!r}]", errors.InDimsError
            )
    elif isinstance(kw_in_dims, int) and not isinstance(kw_in_dims, bool):
        dims += [kw_in_dims] * of_kwargs.num_leaves
    else:
        raise errors.InDimsError(
            f"{call}: kw_in_dims={kw_in_dims!r} is a {type(kw_in_dims).__name__}; pass a dict of "
            "name to dims, an int, or None"
        )
    mapped, size, first = [], None, None
    columns: dict[int, Column] = {}
    for i, (leaf, d) in enumerate(zip(leaves, dims, strict=True)):
        if isinstance(leaf, Column | Source):
            column = columns[len(mapped)] = _checked(leaf, d, _where(i, args), call)
            if size is not None and len(column) != size:
                raise _disagree(
                    _where(first or 0, args),
                    size,
                    f"{_where(i, args)}, a column of a source,",
                    len(column),
                    call,
                )
            size, first = len(column), i if first is None else first
            leaves[i] = column.rows_between(0, min(HEAD, size))
            mapped.append((i, 0))
            continue
        if d is None or not isinstance(leaf, torch.Tensor):
            continue
        if leaf.layout is not torch.strided or leaf.is_nested:
            raise errors.UnsupportedOperatorError(
                f"{call}: {_where(i, args)} is a "
                f"{'nested tensor' if leaf.is_nested else f'tensor of layout {leaf.layout}'}; only "
                "dense "
                "(strided) tensors can be mapped: call .to_dense() on it, or "
                "torch.nested.to_padded_tensor"
            )
        if not -leaf.ndim <= d < leaf.ndim:
            raise errors.InDimsError(
                f"{call}: {_where(i, args)} has {leaf.ndim} dimensions (shape "
                f"{tuple(leaf.shape)}), in_dim {d} is out of range; "
                + (
                    "a 0-dimensional tensor cannot be mapped: pass None for it"
                    if leaf.ndim == 0
                    else f"use {-leaf.ndim} to {leaf.ndim - 1}, or None"
                )
            )
        d %= leaf.ndim
        if size is None:
            size, first = leaf.shape[d], i
        elif leaf.shape[d] != size:
            what = f"{_where(i, args)} of shape {tuple(leaf.shape)}"
            raise _disagree(
                _where(first or 0, args), size, what, f"{leaf.shape[d]} along dimension {d}", call
            )
        mapped.append((i, d))
    if size is None:
        raise errors.InDimsError(
            f"{call}: no tensor argument is mapped (in_dims={in_dims!r}), so the number of samples "
            "is unknown; give at least one "
            "tensor an int in_dim"
        )
    return Batch(leaves, structure, tuple(mapped), size, columns)


@functools.lru_cache(64)
def _of_leaves(count: int) -> pytree.TreeSpec:
    """The structure of a call with tensors for arguments: flattening anew takes longer."""
    return pytree.tree_flatten(((0,) * count, {}))[1]


def _disagree(first: str, size: int, other: str, found: Any, call: str) -> errors.InDimsError:
    return errors.InDimsError(
        f"{call}: the sizes of the mapped dimensions disagree: {first} has {size} samples, {other} "
        f"has {found}; all mapped arguments "
        "need one size"
    )


def _checked(leaf: Column | Source, d: int | None, where: str, call: str) -> Column:
    """The column, unless it is a whole source, or not mapped over its rows."""
    if isinstance(leaf, Source):
        names = ", ".join(spec.name for spec in leaf.specs)
        raise errors.InDimsError(
            f"{call}: {where} is a source of the columns {names}; pass its columns, an argument "
            "each: *source.columns, or source[name]"
        )
    if d not in (0, -1 - len(leaf.shape)):
        raise errors.InDimsError(
            f"{call}: {where} is a column of a source, and its in_dim is {d}; its samples are its "
            "rows, so the in_dim must be 0: read it "
            "yourself (column.read) to share it among samples"
        )
    return leaf


def _where(leaf: int, args: tuple[Any, ...]) -> str:
    seen = 0
    for number, arg in enumerate(args):
        seen += len(pytree.tree_leaves(arg))
        if leaf < seen:
            return f"argument {number}"
    return "a keyword argument"


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

    None for an unmapped result.

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
    if isinstance(out_dims, list):
        out_dims = tuple(out_dims)
    if isinstance(out_dims, tuple) and len(out_dims) == 1 and structure.is_leaf():
        out_dims = out_dims[0]
    dims = spread(out_dims, tree, call, "out_dims", errors.OutDimsError)
    placed: list[int | None] = []
    for ndim, differs, d, reduction in zip(ndims, mapped, dims, reduced, strict=True):
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
        placed.append(d % (ndim + 1))
    return placed


def output_names(structure: pytree.TreeSpec) -> list[str]:
    """A name for each output: its keys, joined by dots.

    `result` where the function returns one tensor.
    """
    tree = pytree.tree_unflatten([0] * structure.num_leaves, structure)
    names = []
    for path, _ in pytree.tree_flatten_with_path(tree)[0]:
        keys = [
            next(v for v in (getattr(k, a, None) for a in ("key", "idx", "name")) if v is not None)
            for k in path
        ]
        names.append(".".join(map(str, keys)) or "result")
    return names


def call_name(func: Callable[..., Any], in_dims: Any, maker: str = "vmap") -> str:
    """How the user's call is written in errors."""
    name = getattr(func, "__name__", None) or type(func).__name__
    return f"shardmap.{maker}({name}, in_dims={in_dims!r})"
