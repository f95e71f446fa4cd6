"""A progress bar for a map: chunks, samples per second and time left, in all and per device, drawn by rich."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from shardmap.extras import require
from shardmap.run.base import ChunkDone, ChunkRedone, Event, RunFinished, RunStarted, listen


@contextlib.contextmanager
def bar(always: bool = False) -> Iterator[None]:
    """Draw the maps that run inside this context on stderr.

    Args:
        always: Draw where stderr is not a terminal, too; by default nothing is drawn there.

    Raises:
        MissingExtraError: rich is not installed.
    """
    if not always and not sys.stderr.isatty():
        yield
        return
    with bars(always=always) as drawn, listen(drawn):
        yield


@contextlib.contextmanager
def bars(always: bool = False, preparing: bool = False, console: Any = None) -> Iterator[Bars]:
    """What draws events while this context lasts.

    Args:
        always: Draw where stderr is not a terminal, too.
        preparing: Draw a line before anything runs.
        console: A rich console to draw on instead of stderr.

    Raises:
        MissingExtraError: rich is not installed.
    """
    rich_console = require("rich.console", extra="run", purpose="to show progress")
    rich_progress = require("rich.progress", extra="run", purpose="to show progress")
    console = console or rich_console.Console(stderr=True, force_terminal=True if always else None)
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TextColumn("{task.fields[samples]}"),
        rich_progress.TextColumn("{task.fields[chunks]}"),
        rich_progress.TextColumn("{task.fields[speed]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bars(progress, preparing)


class _Line:
    """One line: the whole map, or one device."""

    def __init__(self, progress: Any, description: str, total: int | None):
        self.progress = progress
        self.task = progress.add_task(description, total=total, samples="", chunks="", speed="")
        self.total = total
        self.samples = 0
        self.chunks = 0
        self.began = time.perf_counter()

    def restart(self, description: str, total: int) -> None:
        """Count from nothing."""
        self.total, self.samples, self.chunks, self.began = total, 0, 0, time.perf_counter()
        self.progress.reset(self.task, description=description, total=total, samples=f"0/{total:,} samples", chunks="", speed="")

    def chunk(self, size: int, planned: int | None) -> None:
        """One more chunk is done."""
        self.samples += size
        self.chunks += 1
        speed = self.samples / max(time.perf_counter() - self.began, 1e-9)
        self.progress.update(
            self.task,
            completed=self.samples,
            samples=f"{self.samples:,}/{self.total:,} samples" if planned else f"{self.samples:,} samples",
            chunks=f"{self.chunks}/{max(planned, self.chunks)} chunks" if planned else f"{self.chunks} chunks",
            speed=f"{speed:,.0f}/s",
        )


class Bars:
    """Draws events: a line for the whole map, and one for each device where there are several."""

    def __init__(self, progress: Any, preparing: bool):
        self.progress = progress
        self.whole = _Line(progress, "preparing", None) if preparing else None
        self.lanes: dict[str, _Line] = {}
        self.planned = 0

    def say(self, text: str) -> None:
        """Put a text where the map's line begins."""
        if self.whole is not None:
            self.progress.update(self.whole.task, description=text)

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        if isinstance(event, RunStarted):
            self._started(event)
        elif isinstance(event, ChunkDone) and self.whole is not None:
            size = event.stop - event.start
            self.whole.chunk(size, self.planned)
            if event.device in self.lanes:  # of no total: faster devices take more
                self.lanes[event.device].chunk(size, None)
        elif isinstance(event, ChunkRedone):
            line = self.lanes.get(event.device, self.whole)
            if line is not None:
                self.progress.update(line.task, description=f"{event.device}, again: {event.reason[:40]}")
        elif isinstance(event, RunFinished):
            self.say("mapped")

    def _started(self, event: RunStarted) -> None:
        self.planned = event.chunks
        if self.whole is None:
            self.whole = _Line(self.progress, "mapping", event.samples)
        self.whole.restart("mapping", event.samples)
        for line in self.lanes.values():
            self.progress.remove_task(line.task)
        several = len(event.devices) > 1
        self.lanes = {name: _Line(self.progress, f"  {name}", event.samples) for name in event.devices} if several else {}
