"""`shardmap report RUN`: writes a run folder as one HTML page, without network or scripts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardmap._extras import require
from shardmap.errors import ConfigError
from shardmap.jobs.report import figures, lanes, samples
from shardmap.jobs.report.figures import Curve, Histogram, Picture, Sheet, Statistics
from shardmap.jobs.report.record import PAGE, Record, read_folder
from shardmap.jobs.report.samples import Output, Sample, Unread
from shardmap.planning.memory import format_bytes
from shardmap.planning.table import format_seconds
from shardmap.store import elements

MOST_PREVIEWS = 60
"""The most outputs that are read; the others are listed by name, shape and size."""
SHOWN, MOST_FACTOR = 640, 10
"""The width of images in pixels of the screen, and the most screen pixels for one image pixel."""
ASKED = (
    "task",
    "function",
    "loss",
    "params",
    "model",
    "weights",
    "data",
    "source",
    "reduce",
    "report",
)
"""Keys of the configuration that describe the computation; all keys are at the page's end."""
CARD_LETTERS = 40
"""The longest text that is shown as a card; longer texts and paths get lines of their own."""


@dataclass(frozen=True)
class Preview:
    """The part of an output that the page shows."""

    name: str
    shape: str
    dtype: str
    bytes: int
    elements: int
    """The number of elements that were read."""
    said: str
    """Text on the rows that were read, or the reason why there are none."""
    statistics: Statistics | None = None
    histogram: Histogram | None = None
    sheet: Sheet | None = None
    heat_map: Picture | None = None
    curve: Curve | None = None
    complex: bool = False
    boolean: bool = False
    single: str = ""
    """The value, if there is only one."""
    place: int = 0
    """The output's position on the page, from 1."""

    @property
    def shown_width(self) -> int:
        """The width of the images in screen pixels, if there is room."""
        return 0 if self.sheet is None else min(SHOWN, MOST_FACTOR * self.sheet.picture.width)

    @property
    def thinned(self) -> bool:
        """True if a pixel of the heat map shows several values."""
        return (
            self.heat_map is not None and self.heat_map.width * self.heat_map.height < self.elements
        )

    @property
    def square(self) -> bool:
        """True if the heat map is of a square matrix, such as a Gram matrix or a Hessian."""
        return self.heat_map is not None and self.heat_map.square


def write(folder: Path, output: Path | None = None) -> Path:
    """Write a run folder as one HTML page.

    Args:
        folder: A run folder of `shardmap run`. Missing files are named in the page.
        output: The page; `report.html` in the folder by default. A file of that name is replaced.

    Returns:
        Path of the page.

    Raises:
        ConfigError: The folder is no run folder, or the page cannot be written.
        MissingExtraError: A package that draws or reads is not installed.
    """
    folder = Path(folder)
    target = folder / PAGE if output is None else Path(output)
    _put(target, render(read_folder(folder)))
    return target


def render(record: Record) -> str:
    """Render the page as text."""
    jinja = require("jinja2", extra="run", purpose="to write reports")
    environment = jinja.Environment(
        loader=jinja.PackageLoader("shardmap.jobs.report"),
        autoescape=True,  # names, messages and cells come from the run and may hold anything
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": _bytes, "seconds": _seconds, "number": number, "json": _pretty}
    cards, sentences = _found(record)
    return environment.get_template("page.html").render(
        record=record,
        name=record.folder.resolve().name,
        cards=cards,
        sentences=sentences,
        asked=_asked(record),
        timeline=lanes.timeline(record),
        most=_largest(record),
        previews=[
            preview(output, place) for place, output in enumerate(record.outputs[:MOST_PREVIEWS], 1)
        ],
        others=[_unread(output, "", 0) for output in record.outputs[MOST_PREVIEWS:]],
        read_bytes=samples.READ_BYTES,
        show_bytes=_bytes,
        show_seconds=_seconds,
    )


def preview(output: Output, place: int) -> Preview:
    """Read one output, and keep only its numbers and pictures."""
    found = samples.read(output)
    if isinstance(found, Unread):
        return _unread(output, found.reason, place)
    rows = found.rows
    numbers = figures.statistics(rows)
    sheet, heat_map, curve = _pictures(found)
    return dataclasses.replace(
        _unread(output, found.said, place),
        elements=rows.numel(),
        statistics=numbers,
        histogram=figures.histogram(rows, numbers),
        sheet=sheet,
        heat_map=heat_map,
        curve=curve,
        complex=rows.is_complex(),
        boolean=rows.dtype is torch.bool,
        single=number(rows.reshape(-1)[0].item(), digits=8) if numbers.count == 1 else "",
    )


def _pictures(sample: Sample) -> tuple[Sheet | None, Picture | None, Curve | None]:
    """Draw samples as images if they look like images, otherwise rows as lines or points."""
    drawn = figures.sheet(sample)
    if drawn is not None:
        return drawn, None, None
    return None, figures.heat_map(sample.rows), figures.curve(sample.rows)


def _unread(output: Output, said: str, place: int) -> Preview:
    shape = f"[{', '.join(map(str, output.shape))}]"
    return Preview(
        output.name, shape, elements.dtype_name(output.dtype), output.bytes, 0, said, place=place
    )


def _found(record: Record) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Split the summary into short names with values, and sentences."""
    cards, sentences = [], []
    for key, value in (record.summary or {}).items():
        if isinstance(value, dict | list):
            sentences.append((_words(key), json.dumps(value, ensure_ascii=False)))
        elif isinstance(value, str) and (len(value) > CARD_LETTERS or "/" in value):
            sentences.append((_words(key), value))
        else:
            told = (
                format_seconds(value)
                if key == "seconds" and isinstance(value, int | float)
                else number(value)
            )
            cards.append((_words(key), told))
    return cards, sentences


def _asked(record: Record) -> list[tuple[str, str]]:
    """The configuration's keys that describe the computation, with their values."""
    out = []
    for key in ASKED:
        value = record.config.get(key)
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            given = value.get("init_args", value.get("args"))
            arguments = (
                ", ".join(f"{name}={argument!r}" for name, argument in given.items())
                if isinstance(given, dict)
                else ""
            )
            value = f"{value['path']}({arguments})" if arguments else value["path"]
        if value is not None:
            out.append(
                (
                    _words(key),
                    value
                    if isinstance(value, str)
                    else json.dumps(value, ensure_ascii=False, default=str),
                )
            )
    return out


def _largest(record: Record) -> dict[str, float]:
    """The largest prediction or measurement, which fills a whole bar."""
    memory = [
        value for x in record.lanes for value in (x.predicted_peak_bytes, x.peak_bytes) if value
    ]
    seconds = [
        value
        for x in (*record.lanes, record)
        for value in (x.predicted_seconds, x.seconds)
        if value
    ]
    return {"memory": max(memory, default=1), "seconds": max(seconds, default=1.0)}


def number(value: Any, digits: int = 5) -> str:
    """Format a value for people: `1,797`, `0.92345`, `1.2e-07`."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if 1e4 <= abs(value) < 1e9 else f"{value:.{digits}g}"
    if isinstance(value, complex):
        sign = "-" if value.imag < 0 else "+"
        return f"{number(value.real, digits)} {sign} {number(abs(value.imag), digits)}i"
    return str(value)


def _bytes(value: float | None) -> str:
    return "unknown" if value is None else format_bytes(value)


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else format_seconds(value)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _put(path: Path, text: str) -> None:
    """Write the page under another name, then rename it, so that it is always complete."""
    temporary = path.parent / f".{uuid.uuid4().hex}.unfinished"
    try:
        with temporary.open("x", encoding="utf-8", errors="replace") as file:
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"report: {str(path)!r} cannot be written ({reason}); name a file in a folder that can "
            "be written to"
        ) from error
