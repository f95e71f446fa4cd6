"""Run folders for the tests of reports.

Maps that really run, with the files that `shardmap run` leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import shardmap
from shardmap.jobs.folder import RunFolder, environment, save_tensors, write_json
from shardmap.jobs.measure import Peaks, measured, predicted
from shardmap.run import lanes
from shardmap.run.base import Event, listen

CONFIG = {
    "task": "vmap",
    "function": {"path": "mine.mapped", "init_args": {"power": 2}},
    "data": {"path": "mine.load", "init_args": {}},
}
SUMMARY = {
    "headline": "17 of 53 rows stand out.",
    "samples": 53,
    "seconds": 1.5,
    "accuracy": 0.949,
    "score": "gradient_norm",
}


def make(
    folder: Path,
    fn: Callable[..., Any],
    batch: Sequence[torch.Tensor],
    *,
    config: Mapping[str, Any] = CONFIG,
    summary: Mapping[str, Any] = SUMMARY,
    sink: Any = None,
    devices: Sequence[str] = ("cpu",),
    chunk_size: int = 7,
    fails: bool = False,
) -> Path:
    """Run a map and leave its folder.

    Args:
        folder: Its path, which is not there yet.
        fn: Of one sample.
        batch: Tensors with a row per sample.
        config: As config.yaml.
        summary: As summary.json.
        sink: Where outputs go; None for outputs.safetensors.
        devices: One lane each.
        chunk_size: Samples in a chunk.
        fails: Whether the third chunk runs out of memory once, and is computed again.
    """
    plan = shardmap.plan(fn, devices=list(devices), chunk_size=chunk_size)(*batch)
    events: list[Event] = []
    with (
        RunFolder.create(str(folder), yaml.safe_dump(dict(config))) as run,
        pytest.MonkeyPatch.context() as patch,
    ):
        run.log("started", function="mine.mapped", output=str(folder))
        write_json(run.path / "environment.json", environment())
        write_json(run.path / "plan.json", predicted(plan))
        (run.path / "plan.txt").write_text(plan.explain())

        def hear(event: Event) -> None:
            events.append(event)
            run.log_event(event)

        if fails:
            patch.setattr(lanes.Lane, "compute", _failing_once(lanes.Lane.compute))
        names = {lane.name: lane.device for lane in plan.lanes}
        with Peaks(names.values()) as peaks, listen(hear):
            outputs = plan.run()
        write_json(run.path / "measured.json", measured(events, peaks.peak_bytes, names))
        plan.timeline(run.path / "timeline.json")
        if sink is None:
            save_tensors(run.path / "outputs.safetensors", outputs)
        else:
            shardmap.vmap(fn, out=sink, chunk_size=chunk_size)(*batch)
        logging.getLogger("shardmap.jobs").info("epoch 1 of 3: loss 0.123")
        logging.getLogger("shardmap.jobs").warning("a loop computes aten::nonzero for each sample")
        write_json(run.path / "summary.json", summary)
        return run.finish()


def _failing_once(original: Callable[..., Any]) -> Callable[..., Any]:
    calls = []

    def compute(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("as a test")
        return original(self, *args)

    return compute
