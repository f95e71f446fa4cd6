"""Batching rules for flat positions, searches in sorted tensors, and distances between rows.

Reason for rules of ours: `torch.func.vmap` loops over the samples for `take`, `put` and
`searchsorted` with mapped boundaries, and for the backward of distances.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.fold import flat_rows
from shardmap.rules.index import look_up_wrapped
from shardmap.rules.lowering import Given, Lowering, Named, V
from shardmap.rules.promote import expanded
from shardmap.rules.registry import register

Tensor = torch.Tensor


def numbers_of_samples(t: Tensor) -> Tensor:
    """Number the samples: `[B, ...] -> [B, 1]`."""
    return torch.arange(t.shape[0], device=t.device).unsqueeze(1)


@register("search", aten.take.default)
def take(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch `take` of each sample's elements in their order, whatever its strides."""
    x, index = args
    shape = eq.outs[0].spec.shape
    if not x.mapped:
        return b.call(aten.take.default, x, index, shape=shape, dtype=x.dtype)
    if index.mapped:

        def read(x: Tensor, index: Tensor) -> Tensor:
            return look_up_wrapped(x.flatten(1) if x.dim() > 1 else x.unsqueeze(1), index)

    else:

        def read(x: Tensor, index: Tensor) -> Tensor:
            return aten.index.Tensor(x.flatten(1) if x.dim() > 1 else x.unsqueeze(1), [None, index])

    return b.call(read, x, index, shape=shape, dtype=x.dtype)


@register("search", aten.put.default)
def put(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch `put` on a copy."""
    given: list[Any] = [*args, *kwargs.values(), False]
    x, index, source, accumulate = given[:4]

    def write(x: Tensor, index: Tensor, source: Tensor) -> Tensor:
        flat, at, values = flat_rows(x), flat_rows(index), flat_rows(source)
        return aten.index_put(flat, [numbers_of_samples(x), at], values, accumulate).view(x.shape)

    return b.call(write, b.batch(x), b.batch(index), b.batch(source), shape=x.shape, dtype=x.dtype)


@register("search", aten.put_.default)
def put_(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch `put_` in place, through a flat view, or a flat copy where there is no such view."""
    given: list[Any] = [*args, *kwargs.values(), False]
    x, index, source, accumulate = given[:4]
    spec = eq.args[0].spec
    dense = spec.stride == torch.empty(spec.shape, device="meta").stride()

    def write_(x: Tensor, index: Tensor, source: Tensor) -> None:
        size = x.shape[0]
        flat = x.view(size, math.prod(x.shape[1:])) if dense else flat_rows(x).clone()
        aten.index_put_(
            flat, [numbers_of_samples(x), flat_rows(index)], flat_rows(source), accumulate
        )
        if not dense:
            x.copy_(flat.view(x.shape))

    b.effect(write_, x, b.batch(index), b.batch(source))


@register("search", aten.masked_scatter.default)
def masked_scatter(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch `masked_scatter`: a true element takes the source's element of its rank in the mask."""
    x, mask, source = args
    shape = eq.outs[0].spec.shape
    if source.numel == 0 or math.prod(shape) == 0 or mask.dtype != torch.bool:
        return NotImplemented
    ndim = len(shape)

    def write(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
        x, mask = (
            t.view(t.shape[0], *(1,) * (ndim - t.dim() + 1), *t.shape[1:])
            .expand(-1, *shape)
            .flatten(1)
            for t in (x, mask)
        )
        rank = (mask.cumsum(1) - 1).masked_fill(~mask, 0)
        return torch.where(mask, flat_rows(source).gather(1, rank), x).view(-1, *shape)

    return b.call(write, b.batch(x), b.batch(mask), b.batch(source), shape=shape, dtype=x.dtype)


@register("search", aten.masked_scatter_backward.default)
def masked_scatter_backward(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the gradient by the source: each of its elements gets that of the element it went to.

    torch has no kernel for it, and selects by the mask, whose count differs by sample.
    """
    grad, mask, size = args
    if mask.dtype != torch.bool or torch.broadcast_shapes(grad.shape, mask.shape) != grad.shape:
        return NotImplemented
    if mask.shape != grad.shape:
        mask = expanded(b, mask, grad.shape)
    count = math.prod(size)

    def read(grad: Tensor, mask: Tensor) -> Tensor:
        grad, mask = flat_rows(grad), flat_rows(mask)
        at = (mask.cumsum(1) - 1).masked_fill(~mask, count)
        found = grad.new_zeros(grad.shape[0], count + 1).scatter(1, at, grad)
        return found[:, :count].reshape(-1, *size)

    return b.call(read, b.batch(grad), b.batch(mask), shape=tuple(size), dtype=grad.dtype)


# -- sorted sequences


@register("search", aten.searchsorted.Tensor)
def searchsorted(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch `searchsorted`: a shared sequence takes any values, mapped ones take values in rows."""
    boundaries, values = args[:2]
    if values.dtype != boundaries.dtype:
        return NotImplemented
    shape, sorter = eq.outs[0].spec.shape, kwargs.get("sorter")
    options = {k: v for k, v in kwargs.items() if k != "sorter"}
    flat = boundaries.ndim == 1
    dtype = eq.outs[0].spec.dtype
    if flat and not boundaries.mapped and (sorter is None or not sorter.mapped):
        return b.call(
            aten.searchsorted.Tensor,
            boundaries,
            values,
            *args[2:],
            **kwargs,
            shape=shape,
            dtype=dtype,
        )

    def search(boundaries: Tensor, values: Tensor, sorter: Tensor | None) -> Tensor:
        rows = flat_rows(values) if flat else values
        order = None if sorter is None else sorter.contiguous()
        found = aten.searchsorted.Tensor(
            boundaries.contiguous(), rows.contiguous(), *args[2:], **options, sorter=order
        )
        return found.view(values.shape)

    tensors = [b.batch(boundaries), b.batch(values), None if sorter is None else b.batch(sorter)]
    return b.call(search, *tensors, shape=shape, dtype=dtype)


@register("search", aten.bucketize.Tensor)
def bucketize(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch `bucketize`, a search with the arguments exchanged."""
    values, boundaries = args[:2]
    shape, dtype = eq.outs[0].spec.shape, eq.outs[0].spec.dtype
    if not boundaries.mapped:
        return b.call(
            aten.bucketize.Tensor, values, boundaries, *args[2:], **kwargs, shape=shape, dtype=dtype
        )
    if values.dtype != boundaries.dtype:
        return NotImplemented

    def search(values: Tensor, boundaries: Tensor) -> Tensor:
        rows = flat_rows(values).contiguous()
        return aten.searchsorted.Tensor(boundaries.contiguous(), rows, *args[2:], **kwargs).view(
            values.shape
        )

    return b.call(search, b.batch(values), boundaries, shape=shape, dtype=dtype)


# -- distances


@register("search", aten._cdist_forward.default, aten._cdist_backward.default)
def cdist(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch `cdist`, whose kernels take the map as one more leading dimension."""
    spec = eq.outs[0].spec
    ndim = max(a.ndim for a in args if type(a) is V)
    given = [b.align(b.batch(a), ndim) if type(a) is V else a for a in args]
    if eq.op is aten._cdist_backward.default:

        def backward(*values: Any) -> Tensor:
            return aten._cdist_backward(
                *(v.contiguous() if isinstance(v, Tensor) else v for v in values)
            )

        out = b.call(
            backward,
            *given,
            shape=(*(1,) * (ndim - len(spec.shape)), *spec.shape),
            dtype=spec.dtype,
        )
        return b.view(out, spec.shape)
    return b.call(eq.op, *given, **kwargs, shape=spec.shape, dtype=spec.dtype)


@register("search", aten._pdist_forward.default)
def pdist(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> V:
    """Batch `pdist` as the distances of all pairs of rows, of which each is kept once."""
    x, p = args[0], args[1] if len(args) > 1 else 2.0
    spec = eq.outs[0].spec

    def distances(x: Tensor) -> Tensor:
        all_pairs = torch.cdist(x, x, p, "donot_use_mm_for_euclid_dist")
        first, second = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
        return all_pairs[:, first, second]

    return b.call(distances, x, shape=spec.shape, dtype=spec.dtype)


@register("search", aten._pdist_backward.default)
def pdist_backward(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> V:
    """Batch the backward of `pdist` as that of distances to which both rows of a pair belong."""
    grad, x, p, found = args
    spec = eq.outs[0].spec

    def backward(grad: Tensor, x: Tensor, found: Tensor) -> Tensor:
        size, n = x.shape[:2]
        first, second = torch.triu_indices(n, n, 1, device=x.device)

        def both(t: Tensor) -> Tensor:
            square = t.new_zeros(size, n, n)
            square[:, first, second] = t
            return square + square.transpose(1, 2)

        x = x.contiguous()
        return aten._cdist_backward(both(grad), x, x, p, both(found))

    return b.call(backward, *map(b.batch, (grad, x, found)), shape=spec.shape, dtype=spec.dtype)


# -- membership, and positions of a fixed number

_FEW = 16
"""Most test elements that each element is compared with; more are sorted and searched."""


@register("search", aten.isin.Tensor_Tensor)
def isin(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch `isin`: elements are compared with each test element, or searched in sorted ones."""
    x, tests = args
    invert = kwargs.get("invert", False)
    if x.dtype != tests.dtype:
        return NotImplemented
    count, shape = tests.numel, x.shape

    def member(x: Tensor, tests: Tensor) -> Tensor:
        rows, tests = flat_rows(x), flat_rows(tests)
        if count <= _FEW:
            found = (rows.unsqueeze(-1) == tests.unsqueeze(1)).any(-1)
        else:
            tests = tests.sort(1).values.contiguous()
            at = torch.searchsorted(tests, rows.contiguous()).clamp(max=count - 1)
            found = tests.gather(1, at) == rows
        return (~found if invert else found).view(x.shape)

    return b.call(member, b.batch(x), b.batch(tests), shape=shape, dtype=torch.bool)


@register("search", aten.isin.Tensor_Scalar)
def isin_number(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> V:
    """Batch the comparison with one number."""
    x, test = args
    op = aten.ne.Scalar if kwargs.get("invert", False) else aten.eq.Scalar
    return b.call(op, x, test, shape=x.shape, dtype=torch.bool)


@register("search", aten.isin.Scalar_Tensor)
def number_isin(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> V:
    """Batch the search for one number among each sample's elements."""
    number, tests = args
    same = b.call(aten.eq.Scalar, tests, number, shape=tests.shape, dtype=torch.bool)
    same = b.reshape(same, (tests.numel,))
    found = b.call(aten.any.dim, same, 1, shape=(), dtype=torch.bool)
    if not kwargs.get("invert", False):
        return found
    return b.call(aten.logical_not.default, found, shape=(), dtype=torch.bool)


@register("search", aten.nonzero_static.default)
def nonzero_static(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> V:
    """Batch `nonzero_static`: a nonzero element's position is written to its rank."""
    (x,) = args
    size, fill = kwargs["size"], kwargs.get("fill_value", -1)
    shape, dims = eq.outs[0].spec.shape, x.shape

    def positions(x: Tensor) -> Tensor:
        mask = flat_rows(x) != 0
        rank = mask.cumsum(1) - 1
        at = torch.where(mask & (rank < size), rank, size)
        numbers = torch.arange(mask.shape[1], device=x.device).expand(mask.shape)
        found = numbers.new_full((mask.shape[0], size + 1), -1).scatter(1, at, numbers)[:, :size]
        columns, step = [], 1
        for n in reversed(dims):
            columns.append(torch.where(found < 0, fill, found // step % max(n, 1)))
            step *= max(n, 1)
        return torch.stack(columns[::-1], -1) if columns else x.new_empty((len(x), *shape)).long()

    return b.call(positions, x, shape=shape, dtype=torch.int64)
