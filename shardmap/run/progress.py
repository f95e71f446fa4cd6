"""A progress bar for a map: chunks, samples per second and time left, in all and per device, drawn by rich."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
    rich_console = require("rich.console", extra="run", purpose="to show progress")
    rich_progress = require("rich.progress", extra="run", purpose="to show progress")
    console = rich_console.Console(stderr=True, force_terminal=True if always else None)
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("samples"),
        rich_progress.TextColumn("{task.fields[chunks]}"),
        rich_progress.TextColumn("{task.fields[speed]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        with listen(Bars(progress)):
            yield


class Bars:
    """Draws events: a line for the whole map, and one for each device where there are several."""

    def __init__(self, progress: object):
        self.progress = progress
        self.total: object = None
        self.lanes: dict[str, object] = {}
        self.chunks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.samples: dict[str, int] = {}
        self.planned = 0
        self.began = 0.0

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, ChunkDone):
            self._chunk(event)
        elif isinstance(event, ChunkRedone) and event.device in self.lanes:
            self._update(self.lanes[event.device], description=f"{event.device} (again: {event.reason[:40]})")
        elif isinstance(event, RunFinished) and self.total is not None:
            self._update(self.total, description="mapped")

    def _start(self, event: RunStarted) -> None:
        self.planned = event.chunks
        fields = {"chunks": f"0/{event.chunks} chunks", "speed": ""}
        self.total = self.progress.add_task("mapping", total=event.samples, **fields)  # type: ignore[attr-defined]
        self.lanes = {}
        if len(event.devices) > 1:
            for name in event.devices:
                self.lanes[name] = self.progress.add_task(name, total=event.samples, chunks="", speed="")  # type: ignore[attr-defined]

    def _chunk(self, event: ChunkDone) -> None:
        size = event.stop - event.start
        for name, task in (("", self.total), (event.device, self.lanes.get(event.device))):
            if task is None:
                continue
            self.chunks[name] = self.chunks.get(name, 0) + 1
            self.seconds[name] = self.seconds.get(name, 0.0) + event.seconds
            self.samples[name] = self.samples.get(name, 0) + size
            speed = f"{self.samples[name] / self.seconds[name]:,.0f}/s" if self.seconds[name] else ""
            self._update(task, advance=size, chunks=f"{self.chunks[name]} chunks", speed=speed)

    def _update(self, task: object, **what: object) -> None:
        self.progress.update(task, **what)  # type: ignore[attr-defined]
