"""Measurements of a map: the peak memory of each device, and the chunks of each lane."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from shardmap.call.planned import Plan
from shardmap.planning.device import Meter
from shardmap.run.base import ChunkDone, Event, RunFinished
from shardmap.run.progress import Outermost

EVERY_SECONDS = 0.01
"""Seconds between two readings of the memory in use: one takes some 50 microseconds."""


class Peaks:
    """A context that measures the peak memory of each device above the use before.

    The process's own record is exact if the map has set it. If earlier code has
    used more, training for example, the peak is the largest use found every hundredth of a
    second: a shorter peak may be missed. Memory that the process had used and freed before,
    and reuses, is not counted on a CPU.
    """

    def __init__(self, devices: Iterable[str]):
        """Measure `devices`, such as `cpu` and `cuda:0`."""
        self._meters = {name: Meter(torch.device(name)) for name in dict.fromkeys(devices)}
        self._before: dict[str, tuple[int, int]] = {}
        self._most: dict[str, int] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.peak_bytes: dict[str, int] = {}
        """The peak by device; devices that cannot be measured are left out."""

    def __enter__(self) -> Peaks:
        """Record the memory in use, and start to watch it."""
        self._before = self._read()
        self._most = {name: used for name, (used, _) in self._before.items()}
        self._thread = threading.Thread(target=self._watch, name="shardmap peaks", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop watching, and fill in `peak_bytes`."""
        assert self._thread is not None
        self._over.set()
        self._thread.join()
        for name, (used, most) in self._read().items():
            if name in self._before:
                before, record = self._before[name]
                self.peak_bytes[name] = max(
                    0, (most if most > record else max(self._most[name], used)) - before
                )

    def _watch(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            for name, (used, _) in self._read().items():
                self._most[name] = max(self._most.get(name, 0), used)

    def _read(self) -> dict[str, tuple[int, int]]:
        found = {name: meter.read() for name, meter in self._meters.items()}
        return {name: value for name, value in found.items() if value is not None}


def measured(
    events: Sequence[Event], peak_bytes: Mapping[str, int], lanes: Mapping[str, str]
) -> dict[str, Any]:
    """Make the contents of `measured.json`.

    Args:
        events: Events that the executor reported.
        peak_bytes: Peak of each device, measured by `Peaks`.
        lanes: The device of each lane that was planned.

    Returns:
        Seconds of the map, tasks that were handed out again, and for each lane its chunks in the
        order of completion, their total seconds, and the peak of its device, which lanes of one
        device share.
    """
    chunks: dict[str, list[dict[str, Any]]] = {name: [] for name in lanes}
    seconds, redone, outermost = 0.0, collections.Counter[str](), Outermost()
    for event in filter(outermost, events):
        if isinstance(event, ChunkDone):
            values = {
                "start": event.start,
                "stop": event.stop,
                "seconds": round(event.seconds, 6),
                "at": round(event.at, 6),
            }
            chunks.setdefault(event.device, []).append(values)
        elif isinstance(event, RunFinished):
            seconds += event.seconds
            redone.update(event.redone)
    return {
        "seconds": round(seconds, 6),
        "redone": dict(redone),
        "samples": sum(
            chunk["stop"] - chunk["start"] for lane in chunks.values() for chunk in lane
        ),
        "lanes": {
            name: {
                "seconds": round(sum(chunk["seconds"] for chunk in done), 6),
                "peak_bytes": peak_bytes.get(lanes.get(name, name.partition("#")[0])),
                "chunks": done,
            }
            for name, done in chunks.items()
        },
    }


def predicted(plan: Plan) -> dict[str, Any]:
    """Make the contents of `plan.json`: the call, and the expectations for each lane.

    `explain` is the text of `plan.txt`.
    """
    return {
        "call": plan.job.call,
        "samples": plan.samples,
        "fits": plan.fits,
        "predicted_seconds": plan.seconds,
        "lanes": [
            {
                "name": lane.name,
                "device": lane.device,
                "rows": lane.rows,
                "chunk": lane.chunk,
                "chunks": lane.chunks,
                "predicted_peak_bytes": lane.peak_bytes,
                "budget_bytes": lane.budget_bytes,
                "predicted_seconds": lane.seconds,
                "measured": lane.measured,
            }
            for lane in plan.lanes
        ],
        "explain": plan.explain(),
    }
