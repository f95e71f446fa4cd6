"""The arguments of a mapped call: the mapped ones among them, and their mapped dimensions."""

from __future__ import annotations

import functools
from collections import defaultdict, deque, namedtuple
from collections.abc import Callable
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import node_type, pytree
from shardmap.store.columns import Column
from shardmap.store.sources import Source
from shardmap.trace.batch import Batch
from shardmap.trace.container_protocol import is_container
from shardmap.trace.containers import Opened, contains, open_batch

HEAD = 3
"""Number of rows of a source that are read to record, try and measure the function."""


def spread(
    dims: object,
    spec: pytree.TreeSpec,
    call: str,
    name: str,
    error: type[errors.ShardmapError],
) -> list[Any]:
    """Spread a prefix `dims` over the leaves of a structure: one entry per leaf."""
    flat = broadcast(dims, spec, lambda part: node_type(part) not in pytree.SUPPORTED_NODES)
    if flat is None:
        raise error(
            f"{call}: {name}={dims!r} does not fit the structure {spec_text(spec)}; {name} must be "
            "an int, None, or the same structure (or a prefix of it)"
        )
    for d in flat:
        if d is not None and (isinstance(d, bool) or not isinstance(d, int)):
            raise error(
                f"{call}: {name}={dims!r} holds {d!r}, a {type(d).__name__}; use an int or None"
            )
    return flat


def broadcast(
    given: Any, spec: pytree.TreeSpec, is_entry: Callable[[object], bool]
) -> list[Any] | None:
    """One entry of `given` per leaf of `spec`; None if `given` is no prefix of it.

    A mapping matches any mapping of the same keys, a sequence any of the same length.

    Args:
        given: Entries in a pytree.
        spec: The structure.
        is_entry: True if a part of `given` is an entry itself, for all leaves there.
    """
    if is_entry(given):
        return [given] * spec.num_leaves
    node = node_type(given)
    if node not in pytree.SUPPORTED_NODES:
        return None
    children, context = pytree.SUPPORTED_NODES[node].flatten_fn(given)
    children = list(children)
    if isinstance(given, dict) and _is_mapping(spec):
        keys = _keys(spec)
        if given.keys() != set(keys):
            return None
        children = [given[key] for key in keys]
    elif not (node in _SEQUENCES and spec.type in _SEQUENCES) and (
        spec.type is not node or spec.context != context
    ):
        return None
    if len(children) != spec.num_children:
        return None
    out: list[Any] = []
    for child, child_spec in zip(children, spec.children(), strict=True):
        flat = broadcast(child, child_spec, is_entry)
        if flat is None:
            return None
        out += flat
    return out


_SEQUENCES = (tuple, list, deque, namedtuple)


def _is_mapping(spec: pytree.TreeSpec) -> bool:
    return isinstance(spec.type, type) and issubclass(spec.type, dict)


def _keys(spec: pytree.TreeSpec) -> list[Any]:
    """The keys of a mapping."""
    return list(spec.context[1] if spec.type is defaultdict else spec.context)


def spec_text(spec: pytree.TreeSpec) -> str:
    """The text of a structure, with `*` for leaves."""
    if spec.type is None:
        return "*"
    parts = [spec_text(child) for child in spec.children()]
    if spec.type is tuple:
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if spec.type is list:
        return f"[{', '.join(parts)}]"
    if _is_mapping(spec):
        keyed = zip(_keys(spec), parts, strict=True)
        text = f"{{{', '.join(f'{key!r}: {part}' for key, part in keyed)}}}"
        return text if spec.type is dict else f"{spec.type.__name__}({text})"
    kind = spec.context if spec.type is namedtuple else spec.type
    return f"{kind.__name__}({', '.join(parts)})"


def collect(
    args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: Any, kw_in_dims: Any, call: str
) -> Batch:
    """Collect a call's arguments into a batch.

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
        leaves, structure = pytree.tree_flatten((args, kwargs), is_leaf=is_container)
    of_args, of_kwargs = structure.children()
    dims = spread(in_dims, of_args, call, "in_dims", errors.InDimsError)
    if kw_in_dims is None:
        dims += [None] * of_kwargs.num_leaves
    elif isinstance(kw_in_dims, dict):
        unknown = sorted(set(kw_in_dims) - set(kwargs))
        if unknown:
            raise errors.InDimsError(
                f"{call}: kw_in_dims={kw_in_dims!r} names {unknown[0]!r}, which was not passed; "
                f"the keyword arguments are {sorted(kwargs)}"
            )
        for key, of_value in zip(_keys(of_kwargs), of_kwargs.children(), strict=True):
            dims += spread(
                kw_in_dims.get(key), of_value, call, f"kw_in_dims[{key!r}]", errors.InDimsError
            )
    elif isinstance(kw_in_dims, int) and not isinstance(kw_in_dims, bool):
        dims += [kw_in_dims] * of_kwargs.num_leaves
    else:
        raise errors.InDimsError(
            f"{call}: kw_in_dims={kw_in_dims!r} is a {type(kw_in_dims).__name__}; pass a dict of "
            "name to dims, an int, or None"
        )
    leaves, dims, structure, copied = _opened(leaves, dims, structure, call)
    of_args, _ = structure.children()
    mapped, size, first = [], None, None
    copies: set[int] = set()
    columns: dict[int, Column] = {}
    for i, (leaf, d) in enumerate(zip(leaves, dims, strict=True)):
        if isinstance(leaf, Column | Source):
            column = columns[len(mapped)] = _checked(leaf, d, _where(i, of_args), call)
            if size is not None and len(column) != size:
                raise _disagree(
                    _where(first or 0, of_args),
                    size,
                    f"{_where(i, of_args)}, a column of a source,",
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
            kind, remedy = f"tensor of layout {leaf.layout}", "call .to_dense() on it"
            if leaf.is_nested:
                kind = "nested tensor"
                remedy = "pass shardmap.Ragged(list(x.unbind())), or torch.nested.to_padded_tensor"
            raise errors.UnsupportedOperatorError(
                f"{call}: {_where(i, of_args)} is a {kind}; only dense (strided) tensors can be "
                f"mapped: {remedy}"
            )
        if not -leaf.ndim <= d < leaf.ndim:
            raise errors.InDimsError(
                f"{call}: {_where(i, of_args)} has {leaf.ndim} dimensions (shape "
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
            what = f"{_where(i, of_args)} of shape {tuple(leaf.shape)}"
            raise _disagree(
                _where(first or 0, of_args),
                size,
                what,
                f"{leaf.shape[d]} along dimension {d}",
                call,
            )
        if i in copied:
            copies.add(len(mapped))
        mapped.append((i, d))
    if size is None:
        raise errors.InDimsError(
            f"{call}: no tensor argument is mapped (in_dims={in_dims!r}), so the number of samples "
            "is unknown; give at least one "
            "tensor an int in_dim"
        )
    opened = contains(structure, Opened)
    return Batch(leaves, structure, tuple(mapped), size, columns, frozenset(copies), opened)


def _opened(
    leaves: list[pytree.PyTree], dims: list[int | None], structure: pytree.TreeSpec, call: str
) -> tuple[list[pytree.PyTree], list[int | None], pytree.TreeSpec, set[int]]:
    """Open mapped containers; return the leaves, dims and structure, and the positions of copies.

    A container that is shared by the samples, or has no batch dimension there, is flattened as
    pytrees do.
    """
    if not any(map(is_container, leaves)):
        return leaves, dims, structure, set()
    parts: list[object] = []
    where: list[int | None] = []
    copied: set[int] = set()
    for i, (leaf, d) in enumerate(zip(leaves, dims, strict=True)):
        part, own = leaf, [d]
        if is_container(leaf) and d is not None and -leaf.dim() <= d < leaf.dim():
            try:
                part, own, is_copy = open_batch(leaf, d % leaf.dim())
            except ValueError as error:
                raise errors.InDimsError(
                    f"{call}: {_where(i, structure.children()[0])} is a {type(leaf).__name__} "
                    f"that cannot be mapped over dimension {d}: {error}"
                ) from error
            if is_copy:
                copied.update(range(len(where), len(where) + len(own)))
        elif is_container(leaf):
            own = [d] * len(pytree.tree_leaves(leaf))
        parts.append(part)
        where += own
    leaves, structure = pytree.tree_flatten(pytree.tree_unflatten(parts, structure))
    return leaves, where, structure, copied


@functools.lru_cache(64)
def _of_leaves(count: int) -> pytree.TreeSpec:
    """The structure of a call whose arguments are tensors: flattening anew takes longer."""
    return pytree.tree_flatten(((0,) * count, {}))[1]


def _disagree(first: str, size: int, other: str, found: Any, call: str) -> errors.InDimsError:
    return errors.InDimsError(
        f"{call}: the sizes of the mapped dimensions disagree: {first} has {size} samples, {other} "
        f"has {found}; all mapped arguments "
        "need one size"
    )


def _checked(leaf: Column | Source, d: int | None, where: str, call: str) -> Column:
    """The column, or an error if it is a whole source or not mapped over its rows."""
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


def _where(leaf: int, of_args: pytree.TreeSpec) -> str:
    seen = 0
    for number, arg in enumerate(of_args.children()):
        seen += arg.num_leaves
        if leaf < seen:
            return f"argument {number}"
    return "a keyword argument"


def call_name(func: Callable[..., Any], in_dims: Any, maker: str = "vmap") -> str:
    """The text of the user's call in errors."""
    name = getattr(func, "__name__", None) or type(func).__name__
    return f"shardmap.{maker}({name}, in_dims={in_dims!r})"
