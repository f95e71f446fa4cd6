"""Prepare operands of elementwise calls for the batch.

They get one rank, and the dtype that the sample's call computed in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from shardmap.program.ir import Equation, Param
from shardmap.rules.lowering import B, Lowering, V
from shardmap.rules.precision import Operand, Slot, computation_dtype
from shardmap.rules.registry import Operator


def common_dtype(tensors: Iterable[V]) -> torch.dtype:
    """The dtype to which one sample's call promotes these operands.

    A tensor without dimensions counts only if its kind (bool, integer, real, complex) is above
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
    """Prepare `v` to broadcast against `[B, *(ndim sample dimensions)]`.

    An unmapped value needs no change.
    """
    return b.align(v, ndim) if v.mapped and v.ndim < ndim else v


def expanded(b: Lowering, v: V, shape: tuple[int, ...]) -> V:
    """A view of `v` as `[B, *shape]`, for kernels that do not broadcast all their operands."""
    if v.mapped and v.shape == shape:
        return v
    v = aligned(b, v, len(shape))
    return b.call(torch.Tensor.expand, v, [B, *shape], shape=shape, mapped=True)


def dense_expand(t: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`t` broadcast to `shape`, with memory of its own for each element."""
    t = t.expand(*shape)
    repeats = any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True))
    return t.contiguous() if repeats else t


def whole(b: Lowering, v: V, shape: tuple[int, ...]) -> V:
    """Make `v` a dense `[B, *shape]`, for kernels that read past operands that are broadcast."""
    v = aligned(b, v, len(shape))
    return b.call(dense_expand, v, [B, *shape], shape=shape, mapped=True)


class Casts(NamedTuple):
    """Casts of the operands of a batched call, so that it computes what the sample's call does."""

    of: dict[V, V]
    """For each operand that needs a cast, the cast operand."""
    wider: torch.dtype | None = None
    """The dtype that the call computes in, if its result must be rounded to the recorded one."""


NO_CASTS = Casts({})


def promoted(
    b: Lowering,
    eq: Equation,
    op: Operator,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    tensors: Iterable[V],
) -> Casts | None:
    """Casts for operands that the batch would promote differently than the sample did.

    Args:
        b: The builder that the casts are emitted to.
        eq: The recorded call.
        op: Its operator, or the form of it that writes to no operand.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        tensors: The operands that take part in promotion.

    Returns:
        The casts, or None if no dtype gives what the sample's kernel computes.
    """
    tensors = list(tensors)
    first = tensors[0].dtype
    if all(v.dtype == first for v in tensors) or all(v.ndim or not v.mapped for v in tensors):
        return NO_CASTS
    dtype, result = common_dtype(tensors), next(eq.results()).spec.dtype
    if result.is_floating_point and not (dtype.is_floating_point or dtype.is_complex):
        dtype = result  # division and its like compute integers in the real dtype
    odd = [v for v in tensors if v.mapped and not v.ndim and v.dtype != dtype]
    if all(_exact(v.dtype, dtype) for v in odd):
        return Casts({v: b.cast(v, dtype) for v in odd})
    wanted = _asked(b, op, args, kwargs, tensors, dtype)
    if wanted is None:
        return None
    if wanted == dtype:
        return Casts({v: b.cast(v, dtype) for v in odd})
    return Casts({v: b.cast(v, wanted) for v in tensors if v.dtype != wanted}, wanted)


def _exact(source: torch.dtype, target: torch.dtype) -> bool:
    """True if `target` holds every number of `source`."""
    real = source.is_floating_point or source.is_complex
    return source is torch.bool or (real and torch.promote_types(source, target) == target)


def _asked(
    b: Lowering,
    op: Operator,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    tensors: list[V],
    common: torch.dtype,
) -> torch.dtype | None:
    """The dtype in which the kernel computes, found by probes of the kernel itself."""
    operands: list[Operand] = []

    def described(a: Any) -> Any:
        if type(a) is Param:
            return 2.0  # any number: it decides no dtype
        if type(a) is not V:
            return a
        wide = a in tensors
        operands.append(Operand(a.dtype, wide and not a.ndim, wide))
        return Slot(len(operands) - 1)

    positional = tuple([described(a) for a in args])
    named = tuple([(k, described(a)) for k, a in kwargs.items()])
    device = b.sample_device.partition(":")[0]
    return computation_dtype(op, tuple(operands), positional, named, common, device)
