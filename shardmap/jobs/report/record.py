"""Read a run folder: its plan, measurements, findings and log.

Each file that is absent or cannot be read is named in a sentence.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardmap._extras import require
from shardmap.errors import ConfigError, SourceError, StoreError
from shardmap.jobs.report.files import Image, Log, Table, line, read_images, read_log, read_tables
from shardmap.jobs.report.samples import Output, outputs_in, outputs_of
from shardmap.planning.memory import MIB, format_bytes
from shardmap.run.timeline import Bar, Failure

PAGE = "report.html"
"""Name of the page in the folder."""
TEXT_BYTES = 64 * MIB
"""Size of the largest JSON or text file that is read; measured.json of a million chunks has about
that."""


@dataclass(frozen=True)
class Lane:
    """A lane as planned and as measured; a field is None if its value is unknown."""

    name: str
    device: str
    rows: int | None
    chunk: int | None
    chunks: int | None
    predicted_peak_bytes: int | None
    budget_bytes: int | None
    predicted_seconds: float | None
    seconds: float | None
    peak_bytes: int | None
    done: int | None
    """Number of chunks that were computed."""


@dataclass
class Record:
    """The contents of a run folder."""

    folder: Path
    config_text: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] | None = None
    summary: Mapping[str, Any] | None = None
    call: str = ""
    samples: int | None = None
    explain: str = ""
    finished: bool = True
    """True if the run is marked as complete."""
    predicted_seconds: float | None = None
    seconds: float | None = None
    """The seconds of the map, all lanes side by side."""
    lanes: Sequence[Lane] = ()
    planned: bool = False
    measured: bool = False
    bars: Sequence[Bar] = ()
    failures: Sequence[Failure] = ()
    redone: Mapping[str, Any] = field(default_factory=dict)
    log: Log = Log()
    outputs: Sequence[Output] = ()
    where: str = ""
    """The file or store that the outputs are in."""
    images: Sequence[Image] = ()
    tables: Sequence[Table] = ()
    absent: dict[str, str] = field(default_factory=dict)
    """For each part of the page that is empty: a sentence with the reason."""

    def say(self, part: str, sentence: str) -> None:
        """Keep a sentence about data that a part of the page lacks."""
        self.absent[part] = f"{self.absent[part]} {sentence}" if part in self.absent else sentence


def read_folder(folder: Path) -> Record:
    """Read a run folder.

    Args:
        folder: A run folder of `shardmap run`.

    Raises:
        ConfigError: It is no run folder.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        there = (
            "there is no config.yaml in it"
            if folder.is_dir()
            else "that is a file"
            if folder.exists()
            else "it is not there"
        )
        raise ConfigError(
            f"report {str(folder)!r}: this is no run folder, {there}; name a folder that `shardmap "
            "run` has written"
        )
    record = Record(folder)
    _read_config(record, config)
    state = _mapping(record, "state", "state.json")
    record.finished = state is None or state.get("state") == "complete"
    record.environment = _mapping(record, "environment", "environment.json")
    record.summary = _mapping(record, "summary", "summary.json")
    _read_lanes(record)
    _read_timeline(record)
    _read_outputs(record)
    record.log = read_log(folder / "log.jsonl", functools.partial(record.say, "log"))
    record.images = read_images(folder, functools.partial(record.say, "images"))
    record.tables = read_tables(folder, functools.partial(record.say, "tables"))
    return record


ODD = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""The errors of reading JSON that is well-formed but has an unexpected structure."""


class _UnreadableError(Exception):
    """A file that cannot be parsed, with the reason as text."""


def _read_config(record: Record, path: Path) -> None:
    yaml = require("yaml", extra="run", purpose="to read configurations")
    try:
        record.config_text = _text(path)
        values = yaml.safe_load(record.config_text)
        if not isinstance(values, dict):
            raise _UnreadableError(f"it holds {type(values).__name__}, not keys and values")
        record.config = values
    except (_UnreadableError, yaml.YAMLError) as error:
        record.say("config", f"config.yaml cannot be understood: {line(error)}.")


def _mapping(record: Record, part: str, name: str) -> Mapping[str, Any] | None:
    """Read a JSON object from a file; if there is none, keep a sentence and return None."""
    path = record.folder / name
    if not path.is_file():
        record.say(part, f"{name} is not in the run folder.")
        return None
    try:
        values = json.loads(_text(path))
        if not isinstance(values, dict):
            raise _UnreadableError(f"it holds a {type(values).__name__}, not keys and values")
    except (ValueError, RecursionError, _UnreadableError) as error:
        record.say(part, f"{name} cannot be read: {line(error)}.")
        return None
    return values


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > TEXT_BYTES:
            raise _UnreadableError(
                f"it has {format_bytes(path.stat().st_size)}, and no more than "
                f"{format_bytes(TEXT_BYTES)} are read"
            )
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise _UnreadableError(error.strerror or type(error).__name__) from error


def _read_lanes(record: Record) -> None:
    """Join each lane's plan and measurement, by name."""
    plan, measured = (
        _mapping(record, "plan", "plan.json"),
        _mapping(record, "measured", "measured.json"),
    )
    text = record.folder / "plan.txt"
    with contextlib.suppress(_UnreadableError):  # the same text as in plan.json, if that exists
        record.explain = _text(text) if text.is_file() else ""
    planned_lanes: dict[str, Mapping[str, Any]] = {}
    measured_lanes: Mapping[str, Any] = {}
    if plan is not None:
        try:
            record.call, record.samples = str(plan.get("call", "")), _whole(plan.get("samples"))
            record.explain = str(plan.get("explain") or record.explain)
            record.predicted_seconds = _number(plan.get("predicted_seconds"))
            planned_lanes = {str(lane["name"]): lane for lane in plan.get("lanes", [])}
            record.planned = True
        except ODD as error:
            record.say(
                "plan",
                f"plan.json is not as this version of shardmap writes it: {line(repr(error))}.",
            )
    if measured is not None:
        measured_lanes = measured.get("lanes", {})
        redone = measured.get("redone") or {}
        try:
            record.seconds = _number(measured.get("seconds"))
            record.redone = {str(key): value for key, value in redone.items()}
            record.bars = _bars_of(measured_lanes)
            record.measured = True
        except ODD as error:
            record.say(
                "measured",
                f"measured.json is not as this version of shardmap writes it: {line(repr(error))}.",
            )
            measured_lanes = {}
    try:
        names = dict.fromkeys([*planned_lanes, *measured_lanes])
        record.lanes = [
            _lane(name, planned_lanes.get(name, {}), measured_lanes.get(name, {})) for name in names
        ]
    except ODD as error:
        record.say(
            "plan",
            f"The lanes in plan.json and measured.json cannot be understood: {line(repr(error))}.",
        )


def _lane(name: str, planned: Mapping[str, Any], measured: Mapping[str, Any]) -> Lane:
    chunks = measured.get("chunks")
    return Lane(
        name,
        str(planned.get("device", name)),
        _whole(planned.get("rows")),
        _whole(planned.get("chunk")),
        _whole(planned.get("chunks")),
        _whole(planned.get("predicted_peak_bytes")),
        _whole(planned.get("budget_bytes")),
        _number(planned.get("predicted_seconds")),
        _number(measured.get("seconds")),
        _whole(measured.get("peak_bytes")),
        len(chunks) if isinstance(chunks, list) else None,
    )


def _bars_of(lanes: Mapping[str, Any]) -> list[Bar]:
    """Read the chunks in measured.json, on a clock that begins with the first."""
    found = []
    for name, lane in lanes.items():
        free = float("-inf")
        for chunk in sorted(lane.get("chunks", []), key=lambda chunk: float(chunk["at"])):
            at, seconds = float(chunk["at"]), float(chunk["seconds"])
            found.append(
                Bar(
                    str(name),
                    int(chunk["start"]),
                    int(chunk["stop"]),
                    max(at - seconds, free),
                    at,
                    seconds,
                )
            )
            free = at
    zero = min((bar.began for bar in found), default=0.0)
    return [Bar(b.lane, b.start, b.stop, b.began - zero, b.ended - zero, b.seconds) for b in found]


def _read_timeline(record: Record) -> None:
    """Read the chunks of timeline.json, with those that were handed out again.

    If it is absent, measured.json is used.
    """
    trace = _mapping(record, "timeline", "timeline.json")
    if trace is None:
        if record.bars:
            record.absent["timeline"] += (
                " The chunks are drawn as measured.json has them, without those that went back."
            )
        return
    try:
        events = trace["traceEvents"]
        lanes = {
            e["tid"]: str(e["args"]["name"])
            for e in events
            if e["ph"] == "M" and e["name"] == "thread_name"
        }
        bars, failures = [], []
        for e in events:
            if e["ph"] not in ("X", "i"):
                continue
            lane, began, about = lanes[e["tid"]], float(e["ts"]) / 1e6, e["args"]
            start, stop = int(about["start"]), int(about["stop"])
            if e["ph"] == "X":
                bars.append(
                    Bar(
                        lane,
                        start,
                        stop,
                        began,
                        began + float(e["dur"]) / 1e6,
                        float(about["seconds"]),
                    )
                )
            else:
                failures.append(Failure(lane, start, stop, began, str(about["reason"])))
    except ODD as error:
        record.say(
            "timeline",
            f"timeline.json is not as this version of shardmap writes it: {line(repr(error))}.",
        )
        return
    record.bars, record.failures = bars, failures


def _read_outputs(record: Record) -> None:
    """Find the outputs: a file of the folder, or a store that the run names."""
    file = record.folder / "outputs.safetensors"
    if file.is_file():
        try:
            record.outputs, record.where = outputs_in(file), file.name
        except SourceError as error:
            record.say("outputs", f"{error}.")
        return
    inside = record.folder / "results.zarr"
    named = [(record.summary or {}).get("store"), record.config.get("store")]
    urls = (
        [str(inside)] if inside.exists() else [url for url in named if isinstance(url, str) and url]
    )
    if not urls:
        return record.say(
            "outputs",
            "No outputs are kept in the run folder, and the run names no store (save_outputs: true "
            "keeps them).",
        )
    try:
        record.outputs, store = outputs_of(urls[0])
        record.where = store.url
        if missing := len(store.missing()):
            record.say(
                "outputs",
                f"{missing:,} of {store.header.units:,} units of the store are not written; "
                "`shardmap resume` computes them.",
            )
    except StoreError as error:
        record.say("outputs", f"{error}.")


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
