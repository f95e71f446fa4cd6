"""The map folded into a batch dimension that the operator has already.

`[B, n, ...] -> [B*n, ...]` and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from shardmap.rules.lowering import B, Lowering, V


def flat_rows(t: torch.Tensor) -> torch.Tensor:
    """`[B, ...] -> [B, n]`, also of no samples, where -1 could be anything."""
    return t.reshape(t.shape[0], math.prod(t.shape[1:]))


def fold(b: Lowering, v: V) -> V:
    """`v` as one larger batch, expanded first if unmapped: `[B, n, ...] -> [B*n, ...]`.

    Its `shape` stays that of the sample.
    """
    v = b.batch(v)
    return b.call(torch.Tensor.flatten, v, 0, 1, shape=v.shape, dtype=v.dtype)


def fold_to(b: Lowering, v: V, ndim: int) -> V:
    """`v` with `ndim` dimensions, the first of which takes in the map.

    Samples may come with or without it.
    """
    assert v.ndim in (ndim, ndim - 1), (
        f"a sample of shape {v.shape} for an operator on {ndim} dimensions"
    )
    return fold(b, v) if v.ndim == ndim else b.batch(v)


def unfold(b: Lowering, v: V, shape: Sequence[int]) -> V:
    """The result of a call on folded values.

    `[B*n, ...] -> [B, n, ...]`, where `shape` is the sample's, with `n` first.

    A view whatever the strides, because only the first dimension is split.
    """
    shape = tuple(shape)
    return b.call(torch.Tensor.view, v, [B, *shape], shape=shape, dtype=v.dtype, mapped=True)
