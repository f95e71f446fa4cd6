"""Fold the map into a batch dimension that the operator has already.

Shapes go from `[B, n, ...]` to `[B*n, ...]` and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from shardmap.rules.lowering import B, Lowering, V


def flat_rows(t: torch.Tensor) -> torch.Tensor:
    """Flatten samples: `[B, ...] -> [B, n]`, also for an empty batch, where -1 is ambiguous."""
    return t.reshape(t.shape[0], math.prod(t.shape[1:]))


def fold(b: Lowering, v: V) -> V:
    """Make `v` one larger batch, expanded first if unmapped: `[B, n, ...] -> [B*n, ...]`.

    Its `shape` stays that of the sample.
    """
    v = b.batch(v)
    return b.call(torch.Tensor.flatten, v, 0, 1, shape=v.shape, dtype=v.dtype)


def fold_to(b: Lowering, v: V, ndim: int) -> V:
    """Make `v` a tensor of `ndim` dimensions, the first of which includes the map.

    Samples may have that dimension or lack it.
    """
    assert v.ndim in (ndim, ndim - 1), (
        f"a sample of shape {v.shape} for an operator on {ndim} dimensions"
    )
    return fold(b, v) if v.ndim == ndim else b.batch(v)


def unfold(b: Lowering, v: V, shape: Sequence[int]) -> V:
    """Undo `fold` for the result of a call on folded values.

    `[B*n, ...] -> [B, n, ...]`, where `shape` is the sample's, with `n` first.

    It is a view for any strides, because only the first dimension is split.
    """
    shape = tuple(shape)
    return b.call(torch.Tensor.view, v, [B, *shape], shape=shape, dtype=v.dtype, mapped=True)
