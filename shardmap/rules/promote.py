"""Operands of elementwise calls, made ready for the batch.

One rank, and the dtype that the sample's call computed in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from shardmap.rules.lowering import B, Lowering, V


def common_dtype(tensors: Iterable[V]) -> torch.dtype:
    """The dtype to which one sample's call promotes these operands.

    A tensor without dimensions counts only where its kind (bool, integer, real, complex) is above
    that of all tensors with dimensions; see
    https://docs.pytorch.org/docs/stable/tensor_attributes.html#type-promotion-doc.
    """
    with_dims, without = [], []
    for v in tensors:
        (with_dims if v.ndim else without).append(v.dtype)
    if not with_dims or not without:
        return functools.reduce(torch.promote_types, with_dims or without)
    high = functools.reduce(torch.promote_types, with_dims)
    low = functools.reduce(torch.promote_types, without)
    if high.is_complex:
        return high
    if high.is_floating_point:
        return high.to_complex() if low.is_complex else high
    if high is torch.bool or low.is_floating_point or low.is_complex:
        # An integer tensor and a real number without dimensions meet in that number's dtype.
        return torch.promote_types(high, low)
    return high


def aligned(b: Lowering, v: V, ndim: int) -> V:
    """`v` ready to broadcast against `[B, *(ndim sample dimensions)]`.

    An unmapped value already is.
    """
    return b.align(v, ndim) if v.mapped and v.ndim < ndim else v


def expanded(b: Lowering, v: V, shape: tuple[int, ...]) -> V:
    """A view of `v` as `[B, *shape]`, for kernels that do not broadcast all their operands."""
    if v.mapped and v.shape == shape:
        return v
    v = aligned(b, v, len(shape))
    return b.call(torch.Tensor.expand, v, [B, *shape], shape=shape, mapped=True)


def promoted(b: Lowering, tensors: Iterable[V], result: torch.dtype) -> dict[V, V]:
    """Casts for operands that the batch would promote differently than the sample did.

    Args:
        b: Where the casts are emitted.
        tensors: The operands that take part in promotion.
        result: The recorded dtype of the result.

    Returns:
        For each operand that needs a cast, the cast one.
    """
    tensors = list(tensors)
    first = tensors[0].dtype
    if all(v.dtype == first for v in tensors) or all(v.ndim or not v.mapped for v in tensors):
        return {}
    dtype = common_dtype(tensors)
    if result.is_floating_point and not (dtype.is_floating_point or dtype.is_complex):
        dtype = result  # division and its like compute integers in the real dtype
    return {v: b.cast(v, dtype) for v in tensors if v.mapped and not v.ndim and v.dtype != dtype}
