"""Lay out the lanes of a run as blocks on a common clock, ready to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardmap.jobs.report.record import Record
from shardmap.planning.table import format_seconds
from shardmap.run.timeline import Bar, Failure

NARROW = 1 / 600
"""Part of the whole time below which chunks are drawn together: narrower blocks cannot be
distinguished."""
MOST_LANES, MOST_FAILURES = 64, 100
"""The most lanes that are drawn, and the most failures that are listed."""


@dataclass(frozen=True)
class Block:
    """One chunk, or neighbours that are too short to be seen alone."""

    left: float
    width: float
    """Left end and width as parts of the whole time."""
    again: bool
    """True if a chunk in it was computed again."""
    odd: bool
    """True for every other block, which has another shade."""
    told: str


@dataclass(frozen=True)
class Strip:
    """One lane."""

    name: str
    blocks: Sequence[Block]
    marks: Sequence[tuple[float, str]]
    """The places where chunks were handed out again, with the reasons."""
    told: str


@dataclass(frozen=True)
class Timeline:
    """All lanes."""

    strips: Sequence[Strip]
    ticks: Sequence[tuple[float, str]]
    """Positions as parts of the whole time, and the labels of the clock."""
    left_out: int
    """Number of lanes that are not drawn."""
    together: bool
    """True if some blocks hold several chunks."""
    again: bool


def timeline(record: Record) -> Timeline | None:
    """The lanes of a run; None if no chunk is known."""
    if not record.bars and not record.failures:
        return None
    ends = [b.ended for b in record.bars] + [f.at for f in record.failures]
    whole = max(*ends, record.seconds or 0.0, 1e-9)
    names = dict.fromkeys(
        [
            *[x.name for x in record.lanes],
            *[b.lane for b in record.bars],
            *[f.lane for f in record.failures],
        ]
    )
    again = _again(record.bars, record.failures)
    bars: dict[str, list[tuple[Bar, bool]]] = {name: [] for name in names}
    for bar, redone in sorted(zip(record.bars, again, strict=True), key=lambda pair: pair[0].began):
        bars[bar.lane].append((bar, redone))
    strips, together = [], False
    for name in list(names)[:MOST_LANES]:
        blocks = _blocks(bars[name], whole)
        together = together or len(blocks) < len(bars[name])
        marks = [
            (f.at / whole, f"{_samples(f)} went back: {f.reason}")
            for f in record.failures
            if f.lane == name
        ]
        count, last = len(bars[name]), bars[name][-1][0].ended if bars[name] else 0.0
        told = (
            f"{count:,} chunk{'s' if count != 1 else ''}, {format_seconds(last)}"
            if count
            else "no chunks"
        )
        strips.append(Strip(name, blocks, marks[:MOST_FAILURES], told))
    ticks = [
        (part, "0" if not part else format_seconds(part * whole))
        for part in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return Timeline(strips, ticks, max(0, len(names) - MOST_LANES), together, any(again))


def _again(bars: Sequence[Bar], failures: Sequence[Failure]) -> list[bool]:
    """For each chunk: True if some of its samples were handed out a second time."""
    starts, stops, ends = (
        np.array([getattr(b, key) for b in bars]) for key in ("start", "stop", "ended")
    )
    found = np.zeros(len(bars), dtype=bool)
    for f in failures if bars else ():
        found |= (starts < f.stop) & (stops > f.start) & (ends > f.at)
    return found.tolist()


def _blocks(bars: Sequence[tuple[Bar, bool]], whole: float) -> list[Block]:
    """Make blocks in order.

    A short chunk joins the block of the short one before it unless one of them was computed again.
    """
    groups: list[list[tuple[Bar, bool]]] = []
    for bar, again in bars:
        last = groups[-1][-1] if groups else None
        near = last is not None and bar.began - last[0].ended < NARROW * whole
        if (
            near
            and last is not None
            and _is_short(bar, whole)
            and _is_short(last[0], whole)
            and again == last[1]
        ):
            groups[-1].append((bar, again))
        else:
            groups.append([(bar, again)])
    out = []
    for number, group in enumerate(groups):
        first, last = group[0][0], group[-1][0]
        told = _samples(first) if len(group) == 1 else f"{len(group):,} chunks"
        width = max(last.ended - first.began, 0.0)
        told = f"{told}, {format_seconds(width)}{', computed again' if group[0][1] else ''}"
        out.append(
            Block(
                first.began / whole, max(width / whole, 0.0005), group[0][1], number % 2 == 1, told
            )
        )
    return out


def _is_short(bar: Bar, whole: float) -> bool:
    return bar.ended - bar.began < NARROW * whole


def _samples(chunk: Bar | Failure) -> str:
    return (
        f"samples {chunk.start:,} to {chunk.stop - 1:,}"
        if chunk.stop > chunk.start
        else "no samples"
    )
