"""The history of a run, as a Chrome trace and as a picture."""

from __future__ import annotations

import contextlib
import io
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmap._extras import require
from shardmap.errors import OptionError
from shardmap.planning.split import Split
from shardmap.planning.table import format_seconds
from shardmap.run.base import ChunkDone, ChunkRedone, Event, RunFinished, RunStarted
from shardmap.run.colours import FAINT, INK, RIGHT, WRONG
from shardmap.run.progress import Outermost

DPI = 150
NARROW = 2.0
"""Width in pixels below which a chunk is drawn together with its neighbours: narrower stripes only
show the pixel grid."""
SECOND, TOGETHER, EXPECTED = "#7fb0dc", "#548fc6", "#c4c9d4"
"""Colours of every other chunk, of chunks drawn together, and of the prediction."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A chunk on its lane, in seconds from the run's beginning."""

    lane: str
    start: int
    stop: int
    began: float
    """Time at which the lane began with it: a chunk that is handed out while another is computed
    waits for that."""
    ended: float
    seconds: float
    """Seconds between hand-out and completion."""


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
    """The events of a run, in order."""

    lanes: tuple[str, ...]
    bars: tuple[Bar, ...]
    failures: tuple[Failure, ...]
    seconds: float


def history(events: Sequence[Event]) -> History:
    """The events of one run, on a clock that begins with it.

    Events of maps inside it are left out.
    """
    outermost = Outermost()
    events = [e for e in events if outermost(e)]
    done = sorted([e for e in events if isinstance(e, ChunkDone)], key=lambda e: e.at)
    redone = [e for e in events if isinstance(e, ChunkRedone)]
    ends = [e.at for e in events if isinstance(e, RunFinished)] or [e.at for e in (*done, *redone)]
    begins = [e.at - e.seconds for e in events if isinstance(e, ChunkDone | RunFinished)] or [
        e.at for e in redone
    ]
    zero = min(begins, default=0.0)
    names = [name for e in events if isinstance(e, RunStarted) for name in e.devices]
    free: dict[str, float] = {}
    bars = []
    for e in done:
        began = max(e.at - e.seconds, free.get(e.device, zero))
        free[e.device] = e.at
        bars.append(Bar(e.device, e.start, e.stop, began - zero, e.at - zero, e.seconds))
    failures = tuple([Failure(e.device, e.start, e.stop, e.at - zero, e.reason) for e in redone])
    lanes = dict.fromkeys([*names, *[e.device for e in (*done, *redone)]])
    return History(tuple(lanes), tuple(bars), failures, max(ends, default=zero) - zero)


def write(path: Path, events: Sequence[Event]) -> None:
    """Write a run in Chrome's trace format.

    Each lane is a thread, each chunk a complete event, each failed chunk an instant.

    Args:
        path: The JSON file to write.
        events: Events that the executor reported.

    Raises:
        OptionError: The file cannot be written.
    """
    run = history(events)
    thread = {
        name: i for i, name in enumerate(run.lanes, 1)
    }  # 0 is taken for the idle process by Perfetto
    trace: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "shardmap"}}
    ]
    for name, tid in thread.items():
        trace.append(
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}}
        )
        trace.append(
            {
                "ph": "M",
                "name": "thread_sort_index",
                "pid": 1,
                "tid": tid,
                "args": {"sort_index": tid},
            }
        )
    for b in run.bars:
        began, ended = _micro(b.began), _micro(b.ended)
        about = {
            "start": b.start,
            "stop": b.stop,
            "samples": b.stop - b.start,
            "seconds": b.seconds,
        }
        trace.append(
            {"ph": "X", "name": _samples(b), "cat": "chunk", "pid": 1, "tid": thread[b.lane],
             "ts": began, "dur": round(ended - began, 3),
             "args": about}
        )  # fmt: skip
    for f in run.failures:
        trace.append(
            {"ph": "i", "s": "t", "name": f"again: {_samples(f)}", "cat": "redone", "pid": 1,
             "tid": thread[f.lane], "ts": _micro(f.at),
             "args": {"start": f.start, "stop": f.stop, "reason": f.reason}}
        )  # fmt: skip
    _put(path, "timeline", json.dumps({"traceEvents": trace, "displayTimeUnit": "ms"}).encode())


def _micro(seconds: float) -> float:
    """Microseconds to the nanosecond.

    Viewers drop events of a thread that overlap, be it by a rounding error.
    """
    return round(1e6 * seconds, 3)


def _samples(chunk: Bar | Failure) -> str:
    return (
        f"samples {chunk.start} to {chunk.stop - 1}" if chunk.stop > chunk.start else "no samples"
    )


# -- the picture

ROW, TOP, BOTTOM = 0.62, 0.72, 0.58
LEFT, WIDTH, RIGHT_MARGIN = 1.1, 6.6, 1.6
"""Margins and width of the picture, in inches."""


def draw(path: Path, split: Split, events: Sequence[Event]) -> None:
    """Draw a run, one lane per device.

    The picture shows its chunks, the failed ones, and the predicted time.

    Args:
        path: The picture to write; its suffix says which kind.
        split: The plan with the predicted times.
        events: Events that the executor reported.

    Raises:
        OptionError: The file cannot be written, or its ending names no kind of picture.
        MissingExtraError: matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure", extra="run", purpose="to draw pictures")
    run = history(events)
    lanes = len(split.lanes)
    width, height = LEFT + WIDTH + RIGHT_MARGIN, ROW * lanes + TOP + BOTTOM
    figure = figure_module.Figure(figsize=(width, height), facecolor="white")
    kind, kinds = path.suffix[1:].lower(), figure.canvas.get_supported_filetypes()
    if kind not in kinds:
        raise OptionError(
            f"plan.plot({str(path)!r}): the name's ending says which kind of picture to write; end "
            "it in .png, .svg or .pdf"
        )
    axes = figure.add_axes((LEFT / width, BOTTOM / height, WIDTH / width, ROW * lanes / height))
    longest = max(run.seconds, min(split.seconds, 2 * run.seconds), 1e-6)
    unit, scale = ("s", 1.0) if longest >= 1 else ("ms", 1e3) if longest >= 1e-3 else ("us", 1e6)
    merged = []
    for row, lane in enumerate(split.lanes):
        expected = sum(
            other.seconds for other in split.lanes if other.turns == lane.turns
        )  # lanes of one device take turns
        merged.append(_draw_lane(axes, row, lane.name, run, expected, longest, scale))
    axes.set_xlim(0, scale * longest)
    axes.set_ylim(lanes - 0.5, -0.5)
    axes.set_yticks(
        [row - 0.11 for row in range(lanes)], [_short(lane.name) for lane in split.lanes]
    )
    axes.set_xlabel(unit, color=FAINT)
    axes.tick_params(length=0, colors=INK)
    axes.tick_params(axis="x", colors=FAINT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    title, subtitle = _titles(split, run, any(merged))
    figure.text(
        0.2 / width, 1 - 0.14 / height, title, fontsize=13, color=INK, weight="bold", va="top"
    )
    figure.text(0.2 / width, 1 - 0.44 / height, subtitle, fontsize=9, color=FAINT, va="top")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DPI, format=kind)
    _put(path, "plot", picture.getvalue())


def _titles(split: Split, run: History, merged: bool) -> tuple[str, str]:
    speed = (
        f", {split.samples / run.seconds:,.0f} per second" if run.seconds and split.samples else ""
    )
    took, predicted = format_seconds(run.seconds), format_seconds(split.seconds)
    title = f"{split.samples:,} samples in {took}{speed}; {predicted} predicted"
    words = [
        f"blue: {_count(len(run.bars), 'chunk')}{', the narrow ones together' if merged else ''}"
    ]
    if run.failures:
        words.append(f"red: {_count(len(run.failures), 'chunk')} went back to be computed again")
    words.append(
        "grey: predicted from earlier runs"
        if all(x.measured for x in split.lanes)
        else "grey: a guess from operations and bytes"
    )
    return title, ";  ".join(words)


def _draw_lane(
    axes: Any, row: int, name: str, run: History, expected: float, longest: float, scale: float
) -> bool:
    """Draw one lane; return True if chunks were drawn together."""
    pixel = longest / (WIDTH * DPI)
    bars = [b for b in run.bars if b.lane == name]
    spans = _merged(bars, NARROW * pixel)
    alone = [(scale * a, scale * max(b - a, pixel)) for a, b, chunks in spans if chunks == 1]
    many = [(scale * a, scale * max(b - a, pixel)) for a, b, chunks in spans if chunks > 1]
    for colour, which in (
        (RIGHT, alone[0::2]),
        (SECOND, alone[1::2]),
        (TOGETHER, many),
    ):  # neighbours apart
        axes.broken_barh(which, (row - 0.34, 0.46), facecolors=colour, linewidth=0)
    marks = [scale * f.at for f in run.failures if f.lane == name]
    axes.plot(
        marks,
        [row - 0.11] * len(marks),
        linestyle="none",
        marker="x",
        color=WRONG,
        markersize=7,
        markeredgewidth=2,
        clip_on=False,
    )
    axes.broken_barh([(0, scale * expected)], (row + 0.19, 0.11), facecolors=EXPECTED, linewidth=0)
    if expected > longest:
        axes.plot(
            [scale * longest], [row + 0.245], marker=">", color=FAINT, markersize=6, clip_on=False
        )
    beside = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
    ended = format_seconds(bars[-1].ended) if bars else "no chunks"
    axes.annotate(ended, (1.015, row - 0.11), fontsize=9, color=INK, **beside)
    axes.annotate(
        f"{format_seconds(expected)} predicted",
        (1.015, row + 0.24),
        fontsize=8,
        color=FAINT,
        **beside,
    )
    return bool(many)


def _merged(bars: Sequence[Bar], narrow: float) -> list[tuple[float, float, int]]:
    """The spans drawn for a lane: begin, end, and number of chunks in it.

    Only chunks too narrow to see are merged.
    """
    spans: list[tuple[float, float, int]] = []
    mergeable = False
    for b in bars:
        is_narrow = b.ended - b.began < narrow
        if is_narrow and mergeable and b.began - spans[-1][1] < narrow:
            spans[-1] = (spans[-1][0], b.ended, spans[-1][2] + 1)
        else:
            spans.append((b.began, b.ended, 1))
        mergeable = is_narrow
    return spans


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _short(name: str) -> str:
    return name if len(name) <= 12 else f"{name[:11]}…"


def _put(path: Path, what: str, data: bytes) -> None:
    """Write a file under a temporary name, then rename it.

    So a file with the final name is complete, and no other is left behind.
    """
    target = path.parent / f".{uuid.uuid4().hex}.unfinished"
    try:
        try:
            with target.open("xb") as file:
                file.write(data)
            target.replace(path)
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                target.unlink()
            raise
    except (OSError, ValueError) as error:  # ValueError: the name has a null byte
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(
            f"plan.{what}({str(path)!r}): the file cannot be written: {reason}; name one in a "
            "folder "
            "that is there and can be written to"
        ) from error
