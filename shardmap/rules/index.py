"""Indexing: reads and writes at positions that are tensors.

Why rules of ours: `torch.func.vmap` has no kernel for several of them (`take`, `put`, in-place
`index_reduce`, `masked_scatter`), moves dimensions through python for `index` and `index_put`, and
embeddings and their gradients are among the hottest calls there are.

A mapped index becomes one that counts samples too: `x[i] -> x[arange(B), i]`, or a gather, which
checks each sample's bounds. A look-up of rows uses offsets into the flattened batch, with bounds
checked: they would read a neighbour's row instead of raising.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardmap._torch import aten, schema_of
from shardmap.program.ir import SAMPLE_DEVICE
from shardmap.rules.embedding import look_up
from shardmap.rules.fold import flat_rows
from shardmap.rules.lowering import B, Lowering, V, dim
from shardmap.rules.registry import overloads, register

MASKS = (torch.bool, torch.uint8)


def positions(b: Lowering, ndim: int) -> V:
    """The number of each sample in the chunk, `[B, 1, ...]` with `ndim` ones."""
    v = b.call(
        aten.arange.default, B, device=SAMPLE_DEVICE, shape=(), dtype=torch.int64, mapped=True
    )
    return b.view(v, (1,) * ndim)


def align_to(b: Lowering, v: V, ndim: int) -> V:
    """`v` with ones in front, for samples of `ndim` dimensions; unmapped values as well."""
    return v if v.ndim >= ndim else b.view(v, (1,) * (ndim - v.ndim) + v.shape)


def permute(b: Lowering, v: V, order: Sequence[int]) -> V:
    """`v` with its sample dimensions in another order."""
    if list(order) == list(range(v.ndim)):
        return v
    shift = int(v.mapped)
    return b.call(
        aten.permute.default,
        v,
        [0] * shift + [d + shift for d in order],
        shape=[v.shape[d] for d in order],
    )


# -- advanced indexing
# -----------------------------------------------------------------------------------------------------


class Plan:
    """How one indexing call is batched.

    The batched indices, and where the dimensions of its result lie.

    The result of `x[..., i, ...]` has the index's dimensions in the place of the indexed ones if
    these are adjacent, and in front if they are not. An index for the samples added in front is
    adjacent to the others or not, which moves them.
    """

    def __init__(self, b: Lowering, target: V, indices: Sequence[V | None]):
        self.b = b
        indices = [*_without_masks(b, indices)]
        used = [i for i, index in enumerate(indices) if index is not None]
        self.lead, self.mapped = (
            used[0],
            any(index.mapped for index in indices if index is not None),
        )
        self.count = max(index.ndim for index in indices if index is not None)
        """Dimensions of the indices, broadcast together."""
        self.adjacent = used == list(range(used[0], used[-1] + 1))
        self.rest = target.ndim - len(used)
        self.ndim = self.count + self.rest
        self.target = target
        if not self.mapped:
            self.indices: list[Any] = ([None] if target.mapped else []) + indices
            return
        aligned = [index if index is None else align_to(b, index, self.count) for index in indices]
        self.indices = ([positions(b, self.count)] if target.mapped else []) + aligned

    def _batch_at(self) -> int:
        """Where the mapped dimension lies in the batched result."""
        if self.mapped:
            return self.lead if self.adjacent and not self.target.mapped else 0
        return 0 if self.adjacent else self.count

    def _rows_in_front(self) -> bool:
        """Whether the index's dimensions come first in the batched result though they do not in the sample's."""
        return self.mapped and self.target.mapped and self.adjacent and self.lead > 0

    def _order(self) -> list[int]:
        """The sample's result dimensions in the order that the batched result has them."""
        place = list(range(self.lead, self.lead + self.count))
        return (
            place + [d for d in range(self.ndim) if d not in place]
            if self._rows_in_front()
            else list(range(self.ndim))
        )

    def result(self, v: V) -> V:
        """The batched result as a batch of results."""
        at, order = self._batch_at(), self._order()
        if at:
            v = self.b.call(aten.movedim.int, v, at, 0, shape=v.shape)
        if self._rows_in_front():
            v = self.b.call(
                aten.permute.default,
                v,
                [0] + [1 + order.index(d) for d in range(self.ndim)],
                shape=v.shape,
            )
        return v

    def source(self, v: V) -> V:
        """A batch of values to be written, as the batched call takes it."""
        b, at = self.b, self._batch_at()
        v = permute(b, align_to(b, v, self.ndim), self._order())
        if not at:
            return v
        if v.mapped:
            return b.call(aten.movedim.int, v, 0, at, shape=v.shape)
        return b.call(aten.unsqueeze.default, v, at, shape=v.shape)


def _without_masks(b: Lowering, indices: Sequence[V | None]) -> list[V | None]:
    """Masks as the positions where they are true.

    Only unmapped ones have a number of them that all samples share.
    """
    plain: list[V | None] = []
    mapped = any(index is not None and index.mapped for index in indices)
    for index in indices:
        if index is None or index.dtype not in MASKS:
            plain.append(index)
        elif mapped:
            found = b.calls_several(true_positions, index.ndim, index, mapped=False)
            plain += [V(v.index, False, (-1,), torch.int64) for v in found]
        else:
            plain += [V(index.index, False, (-1,), index.dtype)] + [
                V(-1, False, (-1,), index.dtype)
            ] * (index.ndim - 1)
    return plain


def true_positions(mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The indices of a mask's true elements, one tensor for each dimension."""
    return mask.nonzero().unbind(1)


def _given(indices: Sequence[Any]) -> list[Any]:
    """The indices without the placeholders for the further dimensions of a mask."""
    return [i for i in indices if not (type(i) is V and i.index == -1)]


@register("index", aten.index.Tensor)
def index(b: Lowering, eq: Any, args: Any, kwargs: Any) -> Any:
    """`x[i, j]`: the index counts samples too."""
    target, indices = args
    if _unsupported_mask(indices):
        return NotImplemented
    spec = eq.outs[0].spec
    first = indices[0]
    if (
        first is not None
        and first.mapped
        and target.mapped
        and first.dtype not in MASKS
        and not any(indices[1:])
    ):
        return b.call(look_up_wrapped, target, first, shape=spec.shape, dtype=spec.dtype)
    plan = Plan(b, target, indices)
    return plan.result(
        b.call(aten.index.Tensor, target, _given(plan.indices), shape=spec.shape, dtype=spec.dtype)
    )


def look_up_wrapped(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`rows[b][index[b]]` for every `b`, negative indices counted from the end.

    20 times faster than with a second index.
    """
    return look_up(rows, torch.where(index < 0, index + rows.shape[1], index))


def _unsupported_mask(indices: Sequence[V | None]) -> bool:
    """A mapped mask selects another number of elements for each sample.

    One of no dimensions adds a dimension.
    """
    return any(i is not None and i.dtype in MASKS and (i.mapped or i.ndim == 0) for i in indices)


def _index_put(b: Lowering, args: Any, kwargs: Any, in_place: bool) -> Any:
    target, indices, source, accumulate = _bind(
        args, kwargs, ("self", "indices", "values", "accumulate"), (False,)
    )
    used = [i for i in indices if i is not None]
    if len(used) == 1 and used[0].dtype in MASKS and used[0].mapped:
        return _masked_put(b, target, indices, source, accumulate, in_place)
    if _unsupported_mask(indices):
        return NotImplemented
    target = target if in_place else b.batch(target)
    plan = Plan(b, target, indices)
    if source.ndim > plan.ndim:
        return NotImplemented
    op = aten.index_put_.default if in_place else aten.index_put.default
    out = b.call(
        op,
        target,
        _given(plan.indices),
        plan.source(source),
        accumulate,
        shape=target.shape,
        dtype=target.dtype,
    )
    return None if in_place else out


def _masked_put(
    b: Lowering, target: V, indices: Sequence[V | None], source: V, accumulate: bool, in_place: bool
) -> Any:
    """`x[mask] = value` with a mask that differs by sample.

    The value is the same wherever the mask is true, so it is a `where`.
    """
    lead = next(i for i, index in enumerate(indices) if index is not None)
    mask = indices[lead]
    assert mask is not None
    trailing = target.ndim - lead - mask.ndim
    if source.ndim > trailing and source.shape[source.ndim - trailing - 1] != 1:
        return NotImplemented  # as many values as the mask has true elements
    if mask.dtype != torch.bool:
        mask = b.cast(mask, torch.bool)
    mask = b.view(mask, (*mask.shape, *(1,) * trailing))
    if source.ndim > trailing:  # [lead..., 1, rest...]: a one for each dimension of the mask
        cut = source.ndim - trailing - 1
        source = b.view(
            source, (*source.shape[:cut], *(1,) * (mask.ndim - trailing), *source.shape[cut + 1 :])
        )
    target = target if in_place else b.batch(target)
    mask, source = b.align(mask, target.ndim), b.align(source, target.ndim)
    value = b.call(aten.add.Tensor, target, source, shape=target.shape) if accumulate else source
    out = b.call(aten.where.self, mask, value, target, shape=target.shape, dtype=target.dtype)
    if in_place:
        b.call(aten.copy_.default, target, out, shape=target.shape, dtype=target.dtype)
        return None
    return out


def _bind(
    args: Sequence[Any], kwargs: dict[str, Any], names: Sequence[str], defaults: Sequence[Any]
) -> list[Any]:
    """The arguments by the names of the schema; `defaults` are those of the last names."""
    values = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    values.update(zip(names, args, strict=False))
    values.update(kwargs)
    return [values[name] for name in names]


@register("index", aten.index_put.default)
def index_put(b: Lowering, eq: Any, args: Any, kwargs: Any) -> Any:
    """`x[i, j] = v` on a copy."""
    return _index_put(b, args, kwargs, in_place=False)


@register("index", aten.index_put_.default, aten._index_put_impl_.default)
def index_put_(b: Lowering, eq: Any, args: Any, kwargs: Any) -> Any:
    """`x[i, j] = v` in place."""
    kwargs = {k: v for k, v in kwargs.items() if k != "unsafe"}
    return _index_put(b, args[:4], kwargs, in_place=True)


# -- gather and scatter ----------------------------------------------------------------------------------------------------


def _row(b: Lowering, v: V) -> V:
    """`v` batched and with at least one sample dimension."""
    v = b.batch(v)
    return b.view(v, (1,)) if v.ndim == 0 else v


@register("index", aten.gather.default)
def gather(b: Lowering, eq: Any, args: Any, kwargs: Any) -> Any:
    """Every operand batched: an unmapped one is expanded, which `gather` reads without a copy."""
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

    def rule(b: Lowering, eq: Any, args: Any, kwargs: Any) -> Any:
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


# -- one index along a dimension -------------------------------------------------------------------------------------------


def along(b: Lowering, index: V, like: Sequence[int], d: int) -> V:
    """A one-dimensional mapped index as `gather` and `scatter` take it.

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
def index_select(b: Lowering, eq: Any, args: Any, kwargs: Any) -> Any:
    """A shared index selects along the next dimension, a mapped one from a shared tensor in one call, from a mapped one by `gather`."""
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
    """A rule for `op(self, dim, index, ...)`.

    `scatter` is its twin with an index of its own for each sample.

    Args:
        op: The operator.
        scatter: Its twin: takes the same arguments, with the index as wide as the source.
        source_at: Where the source stands behind the index, or None if there is only a number.
        wraps: Whether negative indices count from the end.
    """
    in_place = schema_of(op).is_mutable

    def rule(b: Lowering, eq: Any, args: Any, kwargs: Any) -> Any:
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
def index_fill_tensor(b: Lowering, eq: Any, args: Any, kwargs: Any) -> Any:
    """A mask of each sample's positions.

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
