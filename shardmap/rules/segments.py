"""Batching rules for reductions over segments of a dimension (`segment_reduce`).

The number of each element's segment is found from the lengths or offsets, and one scatter reduces
all samples. `torch.func.vmap` loops over the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.lowering import Given, Lowering, Named, V, arguments
from shardmap.rules.registry import register

_REDUCTIONS = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin", "prod": "prod"}
_NEUTRAL = {"sum": 0.0, "mean": 0.0, "max": -math.inf, "min": math.inf, "prod": 1.0}


def bounds(lengths: Tensor | None, offsets: Tensor | None) -> Tensor:
    """The offset of each segment's first element, and the end: `[..., m] -> [..., m + 1]`."""
    if lengths is None:
        assert offsets is not None
        return offsets
    return torch.nn.functional.pad(lengths.cumsum(-1), (1, 0))


def segment_of(ends: Tensor, n: int) -> Tensor:
    """The segment of each of `n` elements, or the number of segments behind the last one.

    `[..., m + 1] -> [..., n]`.
    """
    at = torch.arange(n, device=ends.device, dtype=ends.dtype).expand(*ends.shape[:-1], n)
    found = torch.searchsorted(ends.contiguous(), at.contiguous(), right=True) - 1
    return found.clamp(max=ends.shape[-1] - 1)


def wide(numbers: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Numbers for the dimensions up to `axis`, expanded over the later ones."""
    shape = (*numbers.shape, *shape[axis + 1 :])
    return numbers.view(*numbers.shape, *(1,) * (len(shape) - numbers.dim())).expand(shape)


def reduced(data: Tensor, ends: Tensor, reduce: str, axis: int, initial: float | None) -> Tensor:
    """The reduction of each segment: `[*outer, n, ...], [*outer, m + 1] -> [*outer, m, ...]`."""
    m, n = ends.shape[-1] - 1, data.shape[axis]
    at = wide(segment_of(ends, n), data.shape, axis)
    size = list(data.shape)
    size[axis] = m + 1
    first = _NEUTRAL[reduce] if initial is None else initial
    out = data.new_full(size, first)
    if reduce == "mean":
        total = out.scatter_add(axis, at, data).narrow(axis, 0, m)
        lengths = wide(ends.diff(dim=-1), total.shape, axis)
        given = math.nan if initial is None else initial
        mean = total / lengths.clamp(min=1)
        return torch.where(lengths > 0, mean, given)
    return out.scatter_reduce(axis, at, data, _REDUCTIONS[reduce]).narrow(axis, 0, m)


def _checked(data: Tensor, lengths: Tensor | None, axis: int) -> None:
    """Raise where the lengths of a sample do not add up to its elements."""
    if lengths is not None and lengths.numel():
        whole = lengths.sum(-1) == data.shape[axis]
        if not bool((whole & (lengths >= 0).all(-1)).all()):
            raise RuntimeError("segment_reduce(): Expected all rows of lengths along axis to sum "
                               "to data.size(lengths.dim()-1) when !unsafe.")  # fmt: skip


@register("segments", aten.segment_reduce.default)
def segment_reduce(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch `segment_reduce`, whose segments all samples share or each has its own."""
    a = arguments(eq, args, kwargs)
    data, lengths, offsets = a["data"], a["lengths"], a["offsets"]
    reduce, axis, initial = a["reduce"], a["axis"], a["initial"]
    if a["indices"] is not None or (lengths is None and offsets is None):
        return NotImplemented
    checked, spec = not a["unsafe"], eq.outs[0].spec
    axis = axis % data.ndim + 1

    def reduce_rows(data: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> Tensor:
        if checked:
            _checked(data, lengths, axis)
        if reduce in ("max", "min") and data.requires_grad and torch.is_grad_enabled():
            # A scatter divides the gradient of a tie, the kernel only if it is positive.
            return torch.segment_reduce(
                data, reduce, lengths=lengths, offsets=offsets, axis=axis, unsafe=True,
                initial=initial,
            )  # fmt: skip
        return reduced(data, bounds(lengths, offsets), reduce, axis, initial)

    given = [None if v is None else b.batch(v) for v in (lengths, offsets)]
    return b.call(reduce_rows, b.batch(data), *given, shape=spec.shape, dtype=spec.dtype)


@register("segments", aten._segment_reduce_backward.default)
def segment_reduce_backward(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> V:
    """Batch the gradient: each element takes its share of its segment's."""
    a = arguments(eq, args, kwargs)
    reduce, initial, spec = a["reduce"], a["initial"], eq.outs[0].spec
    axis = a["axis"] % a["data"].ndim + 1

    def backward(
        grad: Tensor, out: Tensor, data: Tensor, lengths: Tensor | None, offsets: Tensor | None
    ) -> Tensor:
        ends = bounds(lengths, offsets)
        return shares(grad, out, data, ends, reduce, axis, initial)

    names = "grad", "output", "data", "lengths", "offsets"
    given = [None if a[n] is None else b.batch(a[n]) for n in names]
    return b.call(backward, *given, shape=spec.shape, dtype=spec.dtype)


def shares(
    grad: Tensor,
    out: Tensor,
    data: Tensor,
    ends: Tensor,
    reduce: str,
    axis: int,
    initial: float | None,
) -> Tensor:
    """The gradient of `reduced` by its data."""
    m, n = ends.shape[-1] - 1, data.shape[axis]
    if not m:
        return torch.zeros_like(data)
    segment = segment_of(ends, n)
    inside = wide(segment < m, data.shape, axis)
    at = wide(segment.clamp(max=m - 1), data.shape, axis)
    share = grad.gather(axis, at)
    if reduce == "mean":
        lengths = wide(ends.diff(dim=-1), grad.shape, axis).gather(axis, at)
        share = share / lengths.clamp(min=1)
    elif reduce in ("max", "min"):
        # Those that equal the result share its gradient, and so do all that are NaN.
        best = out.gather(axis, at)
        chosen = (data == best) | data.isnan()
        size = list(data.shape)
        size[axis] = m
        count = torch.zeros(size, dtype=data.dtype, device=data.device)
        count = count.scatter_add(axis, at, (chosen & inside).to(data.dtype)).gather(axis, at)
        # The kernel divides positive gradients only.
        divided = torch.where(share > 0, share / count.clamp(min=1), share)
        share = torch.where(chosen, divided, 0)
    elif reduce == "prod":
        first = data.new_full((), 1.0 if initial is None else initial)
        share = share * _others(data, segment, at, axis, m, first)
    return torch.where(inside, share, 0)


def _others(data: Tensor, segment: Tensor, at: Tensor, axis: int, m: int, first: Tensor) -> Tensor:
    """The product of the other elements of each one's segment, with the initial value.

    It is found without dividing by zero: NaN where another is NaN, zero where another is.
    """
    size = list(data.shape)
    size[axis] = m + 1
    behind = wide(segment, data.shape, axis)
    zero, missing = data == 0, data.isnan()

    def of_others(marks: Tensor) -> Tensor:
        count = torch.zeros(size, dtype=torch.int64, device=data.device)
        return count.scatter_add(axis, behind, marks.long()).gather(axis, at) > marks.long()

    plain = torch.where(zero | missing, 1, data)
    ones = first.expand(size).clone()
    rest = ones.scatter_reduce(axis, behind, plain, "prod").gather(axis, at) / plain
    rest = torch.where(of_others(zero), 0, rest)
    return torch.where(of_others(missing), torch.nan, rest)
