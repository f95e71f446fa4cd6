"""Map over the numbers of the samples, each of which is taken from its argument inside.

So are samples served whose argument has a history that the function follows: the gradient inside
goes on through the row into what the argument was computed from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from shardmap.call import arguments as edges
from shardmap.call.options import Options
from shardmap.trace.batch import Batch


def can_be_taken(batch: Batch) -> bool:
    """True if samples are plain rows of tensors."""
    return not (batch.columns or batch.copies)


def by_number(
    func: Callable[..., object], batch: Batch, options: Options
) -> tuple[Callable[..., object], Batch, Options]:
    """The function of a sample's number that takes the sample itself, its batch, and its options.

    Args:
        func: The user's function.
        batch: The call's arguments.
        options: The call's options.
    """

    def of_number(number: torch.Tensor) -> object:
        places = number.view(1)
        args, kwargs = batch.unflatten([_row(batch.leaves[i], d, places) for i, d in batch.mapped])
        return func(*args, **kwargs)

    leaf, _ = batch.mapped[0]
    numbers = torch.arange(batch.size, device=batch.leaves[leaf].device)
    rows = edges.collect((numbers,), {}, 0, None, options.call)
    return of_number, rows, dataclasses.replace(options, in_dims=0, kw_in_dims=None)


def _row(t: torch.Tensor, dim: int, place: torch.Tensor) -> torch.Tensor:
    """One sample of an argument; of an empty batch one of zeros, with the batch's history."""
    if not t.shape[dim]:
        one = t.new_zeros((*t.shape[:dim], 1, *t.shape[dim + 1 :]))
        t = torch.cat([t, one], dim)
    return t.index_select(dim, place).squeeze(dim)
