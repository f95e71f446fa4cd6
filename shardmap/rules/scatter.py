"""Batching rules for `gather`, `scatter` and operators with one index along a dimension.

`torch.func.vmap` has no kernel for several of them (in-place `index_reduce`) and gives wrong
numbers for `index_fill` where both index and value are mapped.

Both operands of a gather or scatter are batched, with the dimension one further back: each
sample's bounds are checked by the kernel. An index of one dimension that differs by sample is
expanded to the shape of its source, and the operator replaced by its twin: `index_add` by
`scatter_add`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardmap._torch import aten, schema_of
from shardmap.program.ir import Equation
from shardmap.rules.embedding import look_up
from shardmap.rules.fold import flat_rows
from shardmap.rules.lowering import B, Lowering, V, dim
from shardmap.rules.registry import overloads, register


def _row(b: Lowering, v: V) -> V:
    """`v` batched and with at least one sample dimension."""
    v = b.batch(v)
    return b.view(v, (1,)) if v.ndim == 0 else v


@register("index", aten.gather.default)
def gather(b: Lowering, eq: Equation, args: Any, kwargs: Any) -> Any:
    """Batch `gather` with every operand mapped: `gather` reads an expanded one without a copy."""
    target, d, index = args[:3]
    shape = eq.outs[0].spec.shape
    rows, at = _row(b, target), _row(b, index)
    out = b.call(
        aten.gather.default,
        rows,
        dim(d, rows.ndim),
        at,
        **kwargs,
        shape=at.shape,
        dtype=target.dtype,
    )
    return b.view(out, shape)


def _scatter(op: Any, source_at: int | None) -> Any:
    in_place = schema_of(op).is_mutable

    def rule(b: Lowering, eq: Equation, args: Any, kwargs: Any) -> Any:
        target, d, index, *rest = args
        rows, at = _row(b, target), _row(b, index)
        if source_at is not None:
            rest[source_at] = _row(b, rest[source_at])
        elif rest and type(rest[0]) is V:
            return NotImplemented
        out = b.call(
            op, rows, dim(d, rows.ndim), at, *rest, **kwargs, shape=rows.shape, dtype=target.dtype
        )
        return None if in_place else b.view(out, target.shape)

    return rule


for _name, _at in {
    "scatter.src": 0,
    "scatter.value": None,
    "scatter.reduce": 0,
    "scatter.value_reduce": None,
    "scatter_add": 0,
    "scatter_reduce.two": 0,
}.items():
    _base, _, _overload = _name.partition(".")
    for _op in overloads(_name, f"{_base}_.{_overload}"):
        register("index", _op)(_scatter(_op, _at))


# -- one index along a dimension


def along(b: Lowering, index: V, like: Sequence[int], d: int) -> V:
    """Expand a one-dimensional mapped index for `gather` and `scatter`.

    `[B, n] -> [B, ..., n, ...]`, `n` at sample dimension `d`.
    """
    count = index.numel
    shape = [1] * len(like)
    shape[d] = count
    wide = list(like)
    wide[d] = count
    v = b.view(index, shape)
    return b.call(aten.expand.default, v, [-1, *wide], shape=wide)


@register("index", aten.index_select.default)
def index_select(b: Lowering, eq: Equation, args: Any, kwargs: Any) -> Any:
    """`index_select` by a shared index in one call, by a mapped one in one call or as a `gather`.

    One call selects from an unmapped tensor, `gather` from a mapped one.
    """
    target, d, index = args
    shape = eq.outs[0].spec.shape
    if target.ndim == 0:
        rows = b.batch(target)
        return b.call(aten.clone.default, rows, shape=(), dtype=target.dtype)
    d %= target.ndim
    if not index.mapped:
        return b.call(
            aten.index_select.default, target, d + 1, index, shape=shape, dtype=target.dtype
        )
    if not target.mapped:
        flat = b.call(aten.reshape.default, index, [-1])
        out = b.call(aten.index_select.default, target, d, flat, dtype=target.dtype, mapped=True)
        out = b.call(torch.Tensor.view, out, [*shape[:d], B, *shape[d:]])
        return (
            b.call(aten.movedim.int, out, d, 0, shape=shape)
            if d
            else V(out.index, True, shape, out.dtype)
        )
    if d == 0:
        flat = b.view(index, (index.numel,))
        return b.call(look_up, target, flat, shape=shape, dtype=target.dtype)
    return b.call(
        aten.gather.default,
        target,
        d + 1,
        along(b, index, target.shape, d),
        shape=shape,
        dtype=target.dtype,
    )


def _along_dim(op: Any, scatter: Any, source_at: int | None, wraps: bool) -> Any:
    """Make a rule for `op(self, dim, index, ...)`.

    `scatter` is its twin with an index of its own for each sample.

    Args:
        op: The operator.
        scatter: Its twin: takes the same arguments, with the index as wide as the source.
        source_at: Position of the source behind the index, or None if there is only a number.
        wraps: True if negative indices count from the end.
    """
    in_place = schema_of(op).is_mutable

    def rule(b: Lowering, eq: Equation, args: Any, kwargs: Any) -> Any:
        target, d, index, *rest = args
        sample = target.shape
        target = b.view(target if in_place else b.batch(target), sample or (1,))
        d, rows = d % target.ndim, target
        if source_at is not None and (rest[source_at].ndim == 0 and target.ndim > 1):
            return NotImplemented
        if not index.mapped:
            if source_at is not None:
                rest[source_at] = _row(b, rest[source_at])
            out = b.call(
                op, rows, d + 1, index, *rest, **kwargs, shape=target.shape, dtype=target.dtype
            )
            return None if in_place else b.view(out, sample)
        named = dict(kwargs)
        if wraps:
            size = target.shape[d]
            other = b.call(aten.add.Tensor, index, size, shape=index.shape)
            index = b.call(
                aten.where.self,
                b.call(aten.lt.Scalar, index, 0, shape=index.shape, dtype=torch.bool),
                other,
                index,
                dtype=index.dtype,
            )
            index = V(index.index, True, args[2].shape, args[2].dtype)
        wide = list(target.shape)
        wide[d] = index.numel
        if source_at is not None:
            source = _row(b, rest[source_at])
            alpha = named.pop("alpha", 1)
            if alpha != 1:
                source = b.call(aten.mul.Tensor, source, alpha, shape=source.shape)
            rest[source_at] = source
        at = along(b, b.cast(index, torch.int64), wide, d)
        out = b.call(
            scatter, rows, d + 1, at, *rest, **named, shape=target.shape, dtype=target.dtype
        )
        return None if in_place else b.view(out, sample)

    return rule


for _name, _twin, _at, _wraps in (
    ("index_add", "scatter_add", 0, False),
    ("index_copy", "scatter.src", 0, False),
    ("index_fill.int_Scalar", "scatter.value", None, True),
    ("index_reduce", "scatter_reduce.two", 0, False),
):
    for _pair in (
        (_name, _twin),
        tuple("_.".join(n.split(".")) if "." in n else n + "_" for n in (_name, _twin)),
    ):
        _both = tuple(overloads(*_pair))
        if len(_both) == 2:
            register("index", _both[0])(_along_dim(*_both, _at, _wraps))


@register("index", *overloads("index_fill.int_Tensor", "index_fill_.int_Tensor"))
def index_fill_tensor(b: Lowering, eq: Equation, args: Any, kwargs: Any) -> Any:
    """Batch `index_fill` by a mask of each sample's positions.

    `torch.func.vmap` gives wrong numbers where index and value are both mapped.
    """
    target, d, index, value = args
    in_place = schema_of(eq.op).is_mutable
    rows = target if in_place else b.batch(target)
    d %= max(target.ndim, 1)
    if not value.mapped and not index.mapped and target.ndim:
        out = b.call(eq.op, rows, d + 1, index, value, shape=target.shape, dtype=target.dtype)
        return None if in_place else out
    size = target.shape[d] if target.ndim else 1
    mask = b.call(marks, index, index.mapped, size, shape=(size,), dtype=torch.bool)
    mask = b.view(mask, (size, *(1,) * (target.ndim - d - 1)) if target.ndim else ())
    source = b.view(b.cast(value, target.dtype), (1,) * target.ndim)
    out = b.call(
        aten.where.self,
        b.align(mask, target.ndim),
        source,
        rows,
        shape=target.shape,
        dtype=target.dtype,
    )
    if not in_place:
        return out
    b.call(aten.copy_.default, target, out, shape=target.shape, dtype=target.dtype)
    return None


def marks(index: torch.Tensor, mapped: bool, size: int) -> torch.Tensor:
    """A mask that is true at the positions `index`: `[n] -> [size]`, or `[B, n] -> [B, size]`."""
    if not mapped:
        return torch.zeros(size, dtype=torch.bool, device=index.device).index_fill(0, index, True)
    at = flat_rows(index).to(torch.int64)
    at = torch.where(at < 0, at + size, at)
    return torch.zeros(index.shape[0], size, dtype=torch.bool, device=index.device).scatter(
        1, at, True
    )
