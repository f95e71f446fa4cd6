"""A progress bar for a map.

It shows chunks, samples per second and time left, in all and per device, drawn by rich.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from shardmap._extras import require
from shardmap._torch import dispatch_modes
from shardmap.run.base import ChunkDone, ChunkRedone, Event, RunFinished, RunStarted, listen
from shardmap.trace.recorder import Recorder
from shardmap.trace.thread_state import keep

WIDE = 90
"""Width of a terminal, in columns, from which optional words are shown."""

_drawing: contextvars.ContextVar[bool] = contextvars.ContextVar("shardmap_drawing", default=False)
"""True if a bar is already drawn: a terminal has room for one."""
keep(_drawing)


@contextlib.contextmanager
def bar(always: bool = False, console: Any = None) -> Iterator[None]:
    """Draw the maps that run inside this context on stderr.

    Args:
        always: Draw where stderr is not a terminal, too; by default nothing is drawn there.
        console: A rich console to draw on instead of stderr.

    Raises:
        MissingExtraError: rich is not installed.
    """
    if _drawing.get() or not _watched(always, console) or _recorded():
        yield
        return
    with bars(always=always, console=console) as drawn, listen(drawn):
        yield


@contextlib.contextmanager
def bars(always: bool = False, preparing: bool = False, console: Any = None) -> Iterator[Bars]:
    """Yield an object that draws events while this context lasts.

    It draws nothing, and needs no rich, if stderr is not a terminal.

    Args:
        always: Draw where stderr is not a terminal, too.
        preparing: Draw a line before anything runs.
        console: A rich console to draw on instead of stderr.

    Raises:
        MissingExtraError: rich is not installed.
    """
    if not _watched(always, console):
        yield Bars(None, preparing)
        return
    with _progress(always, console) as progress:
        token = _drawing.set(True)
        try:
            yield Bars(progress, preparing)
        finally:
            _drawing.reset(token)


def _watched(always: bool, console: Any) -> bool:
    return always or console is not None or (sys.stderr is not None and sys.stderr.isatty())


def _recorded() -> bool:
    """True if this map is inside a function that is being recorded.

    It is replayed as a part of another one.

    Nothing may be drawn there either: the import of rich moves python's random state, which a
    recording would attribute to the function.
    """
    return any(isinstance(mode, Recorder) for mode in dispatch_modes())


def _progress(always: bool, console: Any) -> Any:
    """A rich progress display.

    Lines are plain text, as reasons and paths are full of characters that rich takes for markup.
    """
    rich_progress, rich_table, rich_text = [
        require(f"rich.{name}", extra="run", purpose="to show progress")
        for name in ("progress", "table", "text")
    ]
    console = console or require("rich.console", extra="run", purpose="to show progress").Console(
        stderr=True, force_terminal=always or None
    )

    class Bar(rich_progress.BarColumn):
        """A bar for the whole map.

        A device's bar shows its share of the finished samples, as it has no total of its own.
        """

        def render(self, task: Any) -> Any:
            share = task.fields["share"]
            return (
                super().render(task)
                if share is None
                else rich_text.Text(share, no_wrap=True, overflow="ellipsis")
            )

    class Time(rich_progress.ProgressColumn):
        """The time left, or the time taken."""

        def render(self, task: Any) -> Any:
            ends = task.fields["ends"]
            if task.fields["share"] is not None:
                return rich_text.Text("")
            if task.total is None or task.finished:
                return rich_text.Text(_clock(task.finished_time if task.finished else task.elapsed))
            left = " left" if console.width >= WIDE else ""
            return rich_text.Text(
                f"{_clock(None if ends is None else max(0.0, ends - time.perf_counter()))}{left}"
            )

    def column(
        **how: Any,
    ) -> Any:  # on a narrow terminal the bar shrinks first; then lines are cut, never wrapped
        return rich_table.Column(no_wrap=True, **how)

    def text(field: str, **how: Any) -> Any:
        return rich_progress.TextColumn(
            "{task." + field + "}", markup=False, table_column=column(**how)
        )

    facts = [text(f"fields[{name}]") for name in ("samples", "chunks", "speed")]
    columns = (text("description", max_width=40), Bar(), *facts, Time(table_column=column()))
    return rich_progress.Progress(*columns, console=console, disable=not console.is_terminal)


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=int(seconds)))


class Outermost:
    """Tells the events of a map from those of maps inside it.

    A user's own operator may run.
    """

    def __init__(self) -> None:
        self.open = 0

    def __call__(self, event: Event) -> bool:
        """True if the next event belongs to the outermost map."""
        if isinstance(event, RunStarted):
            self.open += 1
            return self.open == 1
        if isinstance(event, RunFinished):
            self.open = max(0, self.open - 1)
            return self.open == 0
        return self.open <= 1


class _Line:
    """One line: the whole map, or one device."""

    def __init__(self, progress: Any, description: str, whole: bool = True):
        self.progress = progress
        self.blank = {
            "samples": "",
            "chunks": "",
            "speed": "",
            "ends": None,
            "share": None if whole else "",
        }
        self.task = progress.add_task(description, total=None, **self.blank)
        self.start(None, 0)

    def start(self, total: int | None, planned: int) -> None:
        """Reset the counts."""
        self.total, self.planned = total, planned
        self.samples = self.chunks = self.again = 0
        self.began = time.perf_counter()
        if total is not None:
            said = self.blank | {"samples": f"0/{total:,} samples", "chunks": self._chunks()}
            self.progress.reset(self.task, total=total, description="mapping", **said)

    def count(self, size: int) -> None:
        """Count a finished chunk."""
        self.samples += size
        self.chunks += 1
        now = time.perf_counter()
        speed = self.samples / max(
            now - self.began, 1e-9
        )  # by the clock on the wall: what devices do side by side adds up
        ends = now + (self.total - self.samples) / speed if self.total and speed else None
        total = "" if self.total is None else f"/{self.total:,}"
        self.progress.update(
            self.task,
            completed=self.samples,
            samples=f"{self.samples:,}{total} samples",
            chunks=self._chunks(),
            speed=f"{speed:,.0f}/s",
            ends=ends,
        )

    def redo(self) -> None:
        """Count a chunk that is computed again."""
        self.again += 1
        self.progress.update(self.task, chunks=self._chunks())

    def _chunks(self) -> str:
        """Number of chunks done and planned.

        After memory ran out, and at the end of a run, chunks are smaller and more than were
        planned.
        """
        done = f"{self.chunks:,}"
        if self.total is not None:
            going = self.samples < self.total or not self.chunks
            done += f"/{max(self.planned, self.chunks + 1) if going else self.chunks:,}"
        return f"{done} {'chunk' if done == '1' else 'chunks'}" + (
            f", {self.again:,} again" if self.again else ""
        )


class Bars:
    """Draws events: a line for the whole map, and one for each device where there are several."""

    def __init__(self, progress: Any, preparing: bool):
        self.progress = progress
        self.whole = _Line(progress, "preparing") if preparing and progress is not None else None
        self.lanes: dict[str, _Line] = {}
        self.outermost = Outermost()

    def say(self, text: str) -> None:
        """Write a text at the begin of the map's line."""
        if self.whole is not None:
            self.progress.update(self.whole.task, description=" ".join(text.split()))

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        if self.progress is None or not self.outermost(event):
            return
        if isinstance(event, RunStarted):
            self._started(event)
        elif isinstance(event, RunFinished):
            self.say("mapped")
        elif self.whole is not None:
            if self.lanes and event.device not in self.lanes:  # a worker that has joined since
                self.lanes[event.device] = _Line(self.progress, f"  {event.device}", whole=False)
            lines = [
                self.whole,
                *([self.lanes[event.device]] if event.device in self.lanes else []),
            ]
            for line in lines:
                if isinstance(event, ChunkRedone):
                    line.redo()
                elif isinstance(event, ChunkDone):
                    line.count(event.stop - event.start)
            self._share()

    def _started(self, event: RunStarted) -> None:
        self.whole = self.whole or _Line(self.progress, "mapping")
        self.whole.start(event.samples, event.chunks)
        for line in self.lanes.values():
            self.progress.remove_task(line.task)
        several = len(event.devices) > 1
        self.lanes = (
            {name: _Line(self.progress, f"  {name}", whole=False) for name in event.devices}
            if several
            else {}
        )

    def _share(self) -> None:
        done = self.whole.samples if self.whole is not None else 0
        for line in self.lanes.values():
            self.progress.update(
                line.task, share=f"share {line.samples / done:.0%}" if done else ""
            )
