"""Samples of the same values: to compare a function on them proves nothing about other samples."""

from __future__ import annotations

import torch

from shardmap.trace.batch import Batch
from shardmap.trace.compare import same_values
from shardmap.trace.recording import element
from shardmap.trace.surroundings import outer_recordings_suspended
from shardmap.trace.traced import is_traced

_AT_ONCE = 1 << 20
"""Elements that are compared at a time: the mask of a comparison stays small."""


def rows_unlike_first(batch: Batch) -> tuple[int | None, ...]:
    """For each mapped argument a sample whose row is not that of sample 0, the last if it is one.

    None for an argument whose rows are all alike. Rows of a source are not read for this, and
    values that nobody may ask for are not compared: the last row stands for another one.
    """
    last = batch.size - 1
    if is_traced(batch.leaves):
        return (last,) * len(batch.mapped)
    with outer_recordings_suspended():  # which would take it for a question of the function
        return tuple(
            [
                last if place in batch.columns else _unlike(_rows(batch, place), last)
                for place in range(len(batch.mapped))
            ]
        )


def samples_to_compare(batch: Batch, unlike: tuple[int | None, ...]) -> list[int]:
    """Samples beside the first and the last, so that each argument is seen with two rows.

    Args:
        batch: The call's arguments.
        unlike: What `rows_unlike_first` found.
    """
    chosen: list[int] = []
    with outer_recordings_suspended():
        for place, number in enumerate(unlike):
            if number is None or number == batch.size - 1:
                continue
            rows = _rows(batch, place)
            if all(same_values(rows[0], rows[other]) for other in chosen):
                chosen.append(number)
    return chosen


def _rows(batch: Batch, place: int) -> torch.Tensor:
    i, d = batch.mapped[place]
    return element(batch.leaves[i]).detach().movedim(d, 0)


def _unlike(rows: torch.Tensor, last: int) -> int | None:
    if rows.layout is not torch.strided or not same_values(rows[0], rows[last]):
        return last
    step = max(1, _AT_ONCE // max(1, rows[0].numel()))
    for start in range(1, last, step):
        part = rows[start : min(last, start + step)]
        if not same_values(part, rows[:1].expand_as(part)):
            return next(start + k for k, row in enumerate(part) if not same_values(row, rows[0]))
    return None
