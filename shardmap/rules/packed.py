"""Batching rule of packed sequences: the rows of padded sequences, one time after another."""

from __future__ import annotations

import torch
from torch import Tensor

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.lowering import Given, Lowering, Named
from shardmap.rules.registry import register


@register("packed", aten._pack_padded_sequence.default)
def pack(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the packing of sequences whose lengths all samples share."""
    x, lengths, by_batch = args
    if lengths.mapped:
        return NotImplemented
    (count, *rest), steps = eq.outs[0].spec.shape, eq.outs[1].spec.shape[0]

    def positions(lengths: Tensor) -> Tensor:
        """The places of the rows in the padded batch, `[time, sequences]` in order."""
        taken = (lengths > torch.arange(steps).unsqueeze(1)).flatten()
        at = torch.where(taken, taken.cumsum(0) - 1, count)
        return at.new_zeros(count + 1).scatter(0, at, torch.arange(len(at)))[:count]

    def pack_rows(x: Tensor, at: Tensor) -> Tensor:
        by_time = (x.transpose(1, 2) if by_batch else x)[:, :steps]
        return by_time.flatten(1, 2).index_select(1, at.to(x.device))

    def sizes_of(lengths: Tensor) -> Tensor:
        return (lengths > torch.arange(steps).unsqueeze(1)).sum(1)

    at = b.call(positions, lengths, shape=(count,), dtype=torch.int64)
    data = b.call(pack_rows, x, at, shape=(count, *rest), dtype=x.dtype)
    return data, b.call(sizes_of, lengths, shape=(steps,), dtype=torch.int64)
