"""The ways in which the operands of a kernel can lie in memory and meet each other."""

from __future__ import annotations

from collections.abc import Callable

import torch

Layout = Callable[[torch.Tensor], torch.Tensor]


def plain(batch: torch.Tensor) -> torch.Tensor:
    """The batch, dense."""
    return batch


def batch_last(batch: torch.Tensor) -> torch.Tensor:
    """The samples interleaved: neighbours in memory belong to different samples."""
    return batch.movedim(0, -1).contiguous().movedim(-1, 0)


def reversed_dims(batch: torch.Tensor) -> torch.Tensor:
    """Each sample's dimensions in reversed order of memory (a transposed matrix)."""
    order = [0, *range(batch.dim() - 1, 0, -1)]
    return batch.permute(order).contiguous().permute(order)


def channels_last(batch: torch.Tensor) -> torch.Tensor:
    """Each sample's second dimension innermost in memory, as images in channels-last order."""
    if batch.dim() < 4:
        return reversed_dims(batch)
    return batch.movedim(2, -1).contiguous().movedim(-1, 2)


def sliced(batch: torch.Tensor) -> torch.Tensor:
    """A slice with an offset and every second element of a larger tensor."""
    if batch.dim() < 2:
        return torch.stack([batch, batch], -1)[:, 1] if batch.dim() else batch
    *outer, n = batch.shape
    larger = batch.new_zeros(*outer, 2 * n + 3)
    target = larger[..., 3 : 3 + 2 * n : 2]
    target.copy_(batch)
    return target


def padded(batch: torch.Tensor) -> torch.Tensor:
    """Dense samples that lie apart: the rows of a wider table."""
    if batch.dim() < 2:
        return sliced(batch)
    flat = batch.flatten(1)
    wide = torch.cat([flat.new_zeros(len(flat), 1), flat, flat.new_zeros(len(flat), 2)], 1)
    return wide[:, 1 : 1 + flat.shape[1]].unflatten(1, batch.shape[1:]) if flat.numel() else batch


def equal_samples(batch: torch.Tensor) -> torch.Tensor:
    """One sample expanded over the batch: stride 0 in front."""
    return batch[:1].expand(batch.shape)


def equal_columns(batch: torch.Tensor) -> torch.Tensor:
    """The first column of each sample expanded over the last dimension: stride 0 behind."""
    return batch[..., :1].expand(batch.shape) if batch.dim() > 1 else batch


OF_ALL: dict[str, Layout] = {
    "plain": plain,
    "batch_last": batch_last,
    "reversed": reversed_dims,
    "channels_last": channels_last,
    "sliced": sliced,
    "padded": padded,
}
"""Layouts that keep the values: all operands have them at once."""

OF_ONE: dict[str, Layout] = {"equal_samples": equal_samples, "equal_columns": equal_columns}
"""Layouts that repeat values: one operand has them, the others are plain."""
