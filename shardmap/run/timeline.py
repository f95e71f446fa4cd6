"""What happened in a run, as a Chrome trace and as a picture."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmap.errors import OptionError
from shardmap.extras import require
from shardmap.planning.split import Lane, Split
from shardmap.planning.table import format_seconds
from shardmap.report import FAINT, INK, RIGHT, WRONG
from shardmap.run.base import ChunkDone, ChunkRedone, Event, RunFinished, RunStarted

MERGED = 2000
"""Chunks on a lane from which on a picture draws runs of them: more bars than pixels say nothing."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A chunk on its lane, in seconds from the run's beginning."""

    lane: str
    start: int
    stop: int
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A chunk that went back, in seconds from the run's beginning."""

    lane: str
    start: int
    stop: int
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class History:
    """A run, in order."""

    lanes: tuple[str, ...]
    bars: tuple[Bar, ...]
    failures: tuple[Failure, ...]
    seconds: float


def history(events: Sequence[Event]) -> History:
    """The events of one run, on a clock that begins with it."""
    (started,) = [e for e in events if isinstance(e, RunStarted)]
    (finished,) = [e for e in events if isinstance(e, RunFinished)]
    zero = finished.at - finished.seconds
    bars = tuple(Bar(e.device, e.start, e.stop, max(0.0, e.at - e.seconds - zero), e.at - zero) for e in events if isinstance(e, ChunkDone))
    failures = tuple(Failure(e.device, e.start, e.stop, e.at - zero, e.reason) for e in events if isinstance(e, ChunkRedone))
    return History(started.devices, bars, failures, finished.seconds)


def write(path: Path, events: Sequence[Event]) -> None:
    """Write a run in Chrome's trace format: a thread for each lane, a complete event for each chunk, an instant for each that went back.

    Raises:
        OptionError: The file cannot be written.
    """
    run = history(events)
    thread = {name: i for i, name in enumerate(run.lanes)}
    micro = 1e6
    trace: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": name}} for name, tid in thread.items()
    ]
    trace += [
        {
            "ph": "X", "name": f"samples {b.start} to {b.stop - 1}", "cat": "chunk", "pid": 0, "tid": thread[b.lane], "ts": micro * b.began,
            "dur": micro * (b.ended - b.began), "args": {"start": b.start, "stop": b.stop, "samples": b.stop - b.start},
        }
        for b in run.bars
    ]  # fmt: skip
    trace += [
        {
            "ph": "i", "s": "t", "name": f"again: samples {f.start} to {f.stop - 1}", "cat": "redone", "pid": 0, "tid": thread[f.lane],
            "ts": micro * f.at, "args": {"start": f.start, "stop": f.stop, "reason": f.reason},
        }
        for f in run.failures
    ]  # fmt: skip
    text = json.dumps({"traceEvents": trace, "displayTimeUnit": "ms"})
    _atomically(path, "timeline", lambda target: target.write_text(text, encoding="utf-8"))


def draw(path: Path, split: Split, events: Sequence[Event]) -> None:
    """Draw a run, one lane per device: its chunks, those that went back, and how long it was expected to take.

    Raises:
        OptionError: The file cannot be written, or its ending names no kind of picture.
        MissingExtraError: matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure", extra="run", purpose="to draw pictures")
    run = history(events)
    height = 0.62 * len(split.lanes) + 1.3  # inches
    figure = figure_module.Figure(figsize=(9.0, height), facecolor="white")
    axes = figure.add_axes((0.12, 0.58 / height, 0.85, 0.62 * len(split.lanes) / height))
    unit, scale = ("s", 1.0) if run.seconds >= 1 else ("ms", 1e3)
    for row, lane in enumerate(split.lanes):
        _draw_lane(axes, row, lane, run, scale)
    axes.set_ylim(len(split.lanes) - 0.5, -0.5)
    axes.set_yticks(range(len(split.lanes)), [lane.name for lane in split.lanes])
    expected = split.seconds
    axes.set_xlim(0, scale * 1.02 * max(run.seconds, min(expected, 3 * run.seconds), 1e-9))
    axes.set_xlabel(unit, color=FAINT)
    axes.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    speed = f", {split.samples / run.seconds:,.0f} per second" if run.seconds else ""
    figure.text(0.02, 1 - 0.13 / height, f"{split.samples:,} samples in {format_seconds(run.seconds)}{speed}", fontsize=13, color=INK,
                weight="bold", va="top")  # fmt: skip
    guess = "expected from earlier runs" if all(lane.measured for lane in split.lanes) else "a guess from operations and bytes"
    again = f"; {len(run.failures)} went back and were computed again (red)" if run.failures else ""
    figure.text(0.02, 1 - 0.42 / height, f"{len(run.bars):,} chunks (blue){again}; grey: {guess}, {format_seconds(expected)}", fontsize=9,
                color=FAINT, va="top")  # fmt: skip
    _atomically(path, "plot", lambda target: figure.savefig(target, dpi=150))


def _draw_lane(axes: Any, row: int, lane: Lane, run: History, scale: float) -> None:
    bars = _merged([b for b in run.bars if b.lane == lane.name])
    spans = [(scale * b.began, scale * (b.ended - b.began)) for b in bars]
    for shade, which in ((RIGHT, spans[0::2]), ("#7fb0dc", spans[1::2])):  # neighbours apart
        axes.broken_barh(which, (row - 0.34, 0.46), facecolors=shade)
    axes.broken_barh([(0, scale * lane.seconds)], (row + 0.18, 0.12), facecolors="#c4c9d4")
    marks = [scale * f.at for f in run.failures if f.lane == lane.name]
    axes.plot(marks, [row - 0.11] * len(marks), linestyle="none", marker="x", color=WRONG, markersize=7, markeredgewidth=2)


def _merged(bars: Sequence[Bar]) -> list[Bar]:
    """The bars, neighbours taken together where there are too many to see."""
    step = -(-len(bars) // MERGED)
    groups = [bars[i : i + step] for i in range(0, len(bars), max(step, 1))]
    return [Bar(g[0].lane, g[0].start, g[-1].stop, g[0].began, g[-1].ended) for g in groups]


def _atomically(path: Path, what: str, put: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that what has the name is complete."""
    target: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=".", suffix=f".unfinished{path.suffix}", dir=path.parent)
        os.close(handle)
        target = Path(name)
        put(target)
        mode = os.umask(0)
        os.umask(mode)
        target.chmod(0o666 & ~mode)
        target.replace(path)
    except (OSError, ValueError) as error:
        if target is not None:
            with contextlib.suppress(OSError):
                target.unlink()
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"plan.{what}({str(path)!r}): the file cannot be written: {reason}; name another one") from error
