"""What tells two recordings of a function apart, and the rows that they were made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from shardmap._torch import interpreters_aside, storage_id
from shardmap.call.blame import why_not
from shardmap.call.guards import Guards
from shardmap.call.memo import shared_arguments
from shardmap.call.reads import Walk
from shardmap.call.root import Root
from shardmap.trace.batch import Batch
from shardmap.trace.compare import same_values
from shardmap.trace.recording import Recording, element
from shardmap.trace.watch import PythonWatch

P = ParamSpec("P")
T = TypeVar("T")


def explained(
    func: Callable[..., object], batch: Batch, watch: PythonWatch, recording: Recording
) -> str:
    """Paragraph on what `trace="auto"` does with a function that has been recorded.

    Args:
        func: The user's function.
        batch: The call's arguments.
        watch: What python ran while it was recorded.
        recording: The recording.
    """
    walk = Walk(watch, Root(func, shared_arguments(batch)), lambda _: None)
    why = why_not(walk, recording)
    if why:
        return f"The function is recorded at each call, because {why}."
    number = len(Guards(walk.found, recording.captured))
    text = (
        "The function is recorded twice, then replayed while what it reads is unchanged: "
        f"{number:,} values, compared at each call."
    )
    if recording.asked:
        text += (
            " Samples that answer its questions otherwise than the recorded one are recorded at "
            "each call; trace='once' keeps their paths."
        )
    return text


def memories_of(recording: Recording) -> tuple[int, ...]:
    """For each captured tensor the first one that has the same memory."""
    firsts: dict[int, int] = {}
    return tuple(
        [
            firsts.setdefault(storage_id(element(t).untyped_storage()), n)
            for n, t in enumerate(recording.captured)
            if t.layout is torch.strided
        ]
    )


def asks(recording: Recording) -> bool:
    """True if python has asked about values, of samples or of what they share, which may change."""
    return any(eq.answer is not None for eq in recording.program.equations)


def _on_values(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function compute with values: the transforms around a call would wrap its results."""

    @functools.wraps(function)
    def plainly(*args: P.args, **kwargs: P.kwargs) -> T:
        with interpreters_aside():
            return function(*args, **kwargs)

    return plainly


@_on_values
def rows_of(batch: Batch, check: str) -> tuple[list[torch.Tensor], list[bool]]:
    """The first row of each mapped argument, and True for each whose last row is another.

    Args:
        batch: The call's arguments.
        check: The call's option: with "off" the last row has not been looked at.
    """
    rows, apart = [], []
    for i, d in batch.mapped:
        whole = element(batch.leaves[i]).detach()
        if not whole.shape[d]:
            return [], [False]
        first, last = whole.select(d, 0).clone(), whole.select(d, -1)
        rows.append(first)
        apart.append(check != "off" and not same_values(first, last))
    return rows, apart


@_on_values
def others_than_first(batch: Batch, apart: list[bool]) -> list[tuple[int, int]]:
    """For each mapped argument that is not `apart`: a sample whose row is not the first one's.

    Args:
        batch: The call's arguments.
        apart: For each mapped argument: True if different rows of it have been seen.

    Returns:
        `(place among the mapped arguments, number of the sample)`; arguments that have no such row
        are left out.
    """
    if batch.columns or len(apart) != len(batch.mapped):
        return []
    found = []
    for place, ((i, d), seen) in enumerate(zip(batch.mapped, apart, strict=True)):
        rows = [] if seen else element(batch.leaves[i]).detach().movedim(d, 0)[:_LOOKED_AT]
        number = next((k for k, r in enumerate(rows) if not same_values(rows[0], r)), None)
        if number is not None:
            found.append((place, number))
    return found


_LOOKED_AT = 64
"""Samples among which one with another row is searched.

That takes 5 us a row, 0.3 ms for 64: less than the recording that it may ask for. Labels of a few
classes differ within a few rows; arguments that do not are compared at each call instead."""


@_on_values
def hold_known(batch: Batch, rows: list[torch.Tensor], apart: list[bool]) -> bool:
    """True if all rows of the arguments that are not `apart` are the known one.

    Args:
        batch: The call's arguments.
        rows: The known row of each mapped argument.
        apart: For each mapped argument: True if different rows of it have been seen.
    """
    if len(rows) != len(batch.mapped) or batch.columns:
        return False
    for (i, d), row, seen in zip(batch.mapped, rows, apart, strict=True):
        whole = element(batch.leaves[i]).detach()
        if not seen and not same_values(whole, row.unsqueeze(d).expand_as(whole)):
            return False
    return True


@_on_values
def seen_apart(
    rows: list[torch.Tensor], apart: list[bool], now: list[torch.Tensor], now_apart: list[bool]
) -> list[bool]:
    """For each mapped argument: True if two recordings have seen different rows of it.

    Args:
        rows: The first rows of the earlier recording.
        apart: For each argument: True if different rows have been seen before.
        now: The first rows of this recording.
        now_apart: As `apart`, for this one.
    """
    if len(rows) != len(now) or not rows:
        return [False] * max(len(now_apart), 1)
    return [
        a or b or not same_values(r, n)
        for r, a, n, b in zip(rows, apart, now, now_apart, strict=True)
    ]
