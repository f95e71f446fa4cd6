"""Read a run's log, pictures and tables, each up to a size that a page can hold."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shardmap.jobs.report.figures import png
from shardmap.planning.memory import MIB

MOST_LINES, MOST_LETTERS = 400, 2000
"""The most warnings and other lines of the log; the most letters of a message or a cell."""
MOST_PICTURES, PICTURES_BYTES = 40, 32 * MIB
"""The most bytes of all pictures together."""
MOST_TABLES, MOST_ROWS, MOST_COLUMNS = 40, 20, 60
"""The most tables, and the most rows and columns of each."""
SERIOUS = ("warning", "error", "critical")
"""Log levels that are highlighted."""

Say = Callable[[str], None]
"""Receives a sentence about data that are not shown."""


@dataclass(frozen=True)
class LogLine:
    """One line of the log."""

    seconds: float | None
    """Seconds since the log's first line."""
    level: str
    text: str


@dataclass(frozen=True)
class Log:
    """The log without its chunks, which the timeline shows."""

    warnings: Sequence[LogLine] = ()
    messages: Sequence[LogLine] = ()
    started: datetime | None = None
    """The time of its first line."""


@dataclass(frozen=True)
class Image:
    """A picture that the run has written."""

    name: str
    source: str


@dataclass(frozen=True)
class Table:
    """The beginning of a CSV file that the run has written."""

    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    more: bool
    """True if the file has more rows."""
    columns_left_out: int
    numeric: Sequence[bool]
    """For each column: whether every shown cell is a number or empty."""


def read_log(path: Path, say: Say) -> Log:
    """Read log.jsonl line by line."""
    warnings, messages = list[LogLine](), list[LogLine]()
    broken = chunks = left_out = 0
    first: float | None = None
    if not path.is_file():
        say(f"{path.name} is not in the run folder.")
        return Log()
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                values = json.loads(text)
                event = str(values.pop("event", ""))
                at = values.pop("time", values.pop("at", None))
                at = None if at is None else float(at)
            except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
                broken += 1
                continue
            first = at if first is None else first
            if event == "chunk done":
                chunks += 1
                continue
            level = str(
                values.pop("level", "warning" if event in ("chunk redone", "stopped") else "info")
            ).lower()
            into = warnings if level in SERIOUS else messages
            if len(into) == MOST_LINES:
                left_out += 1
                continue
            since = None if at is None or first is None else at - first
            into.append(LogLine(since, cut(level), cut(_told(event, values))))
    if broken:
        lines = (
            "line is no JSON: the run was"
            if broken == 1
            else "lines are no JSON: the run may have been"
        )
        say(f"{broken:,} {lines} cut short while writing, or the file was changed.")
    if chunks:
        say(f"{chunks:,} lines about chunks that were computed are left to the lanes above.")
    if left_out:
        say(f"{left_out:,} more lines are only in {path.name}.")
    started = None
    with contextlib.suppress(OSError, ValueError, OverflowError):  # a time outside the calendar
        started = None if first is None else datetime.fromtimestamp(first, UTC)
    return Log(warnings, messages, started)


def _told(event: str, values: Mapping[str, Any]) -> str:
    """Format a line of the log as a sentence."""
    text = values.get("text", values.get("message"))
    if text is not None:
        return str(text)
    rest = [
        f"{key} {value}" if isinstance(value, int | float | str) else f"{key} {json.dumps(value)}"
        for key, value in values.items()
        if key != "plan" and value not in ({}, [])  # the plan is shown elsewhere
    ]
    return f"{event}: {', '.join(rest)}" if rest else event


def read_images(folder: Path, say: Say) -> list[Image]:
    """Read the PNGs of a folder."""
    found, left_out, total = [], [], 0
    for path in sorted(folder.glob("*.png")):
        try:
            size = path.stat().st_size
            if total + size > PICTURES_BYTES or len(found) == MOST_PICTURES:
                left_out.append(path.name)
                continue
            data = path.read_bytes()
        except OSError as error:
            say(f"{path.name} cannot be read: {error.strerror}.")
            continue
        if not data.startswith(b"\x89PNG\r\n\x1a\n"):
            say(f"{path.name} is no PNG.")
            continue
        total += size
        found.append(Image(path.name, png(data)))
    if left_out:
        names = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        say(
            f"{_count(left_out, 'picture')} more than the page can hold, and only in the folder: "
            f"{names}."
        )
    return found


def read_tables(folder: Path, say: Say) -> list[Table]:
    """Read the first rows of a folder's CSV files."""
    found, paths = [], sorted(folder.glob("*.csv"))
    for path in paths[:MOST_TABLES]:
        rows: list[list[str]] = []
        try:
            with path.open(encoding="utf-8", errors="replace", newline="") as file:
                for row in csv.reader(file):
                    rows.append(row)
                    if len(rows) == MOST_ROWS + 2:
                        break
        except (OSError, csv.Error) as error:
            say(f"{path.name} cannot be read: {line(error)}.")
            continue
        if not rows:
            say(f"{path.name} is empty.")
            continue
        columns = max(map(len, rows))
        width = min(columns, MOST_COLUMNS)
        header, *shown = [
            [cut(cell) for cell in [*row, *[""] * width][:width]] for row in rows[: MOST_ROWS + 1]
        ]
        numeric = [all(_is_number(row[i]) for row in shown) for i in range(width)]
        found.append(
            Table(path.name, header, shown, len(rows) > MOST_ROWS + 1, columns - width, numeric)
        )
    if len(paths) > MOST_TABLES:
        say(f"{_count(paths[MOST_TABLES:], 'table')} only in the folder.")
    return found


def _count(items: Sequence[object], what: str) -> str:
    return f"{len(items):,} {what} is" if len(items) == 1 else f"{len(items):,} {what}s are"


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


def line(error: object) -> str:
    """Format an error in one line."""
    return cut(" ".join(str(error).split()))


def cut(text: str) -> str:
    """Cut a text that is too long for the page."""
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"
