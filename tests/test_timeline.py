"""The timeline and the picture of a run say what happened in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

import shardmap
from shardmap import errors
from shardmap.planning.split import unplanned
from shardmap.run import lanes, timeline
from shardmap.run.base import ChunkDone, ChunkRedone, RunFinished, RunStarted, listen

DEVICES = ["cpu", "cpu", "cpu"]


def planned(n: int = 50, **options: Any) -> shardmap.Plan:
    """A plan of a few chunks on three lanes."""
    return shardmap.plan(lambda r: r.sin(), devices=DEVICES, chunk_size=7, **options)(torch.randn(n, 4))


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The trace's events by phase."""
    trace = json.loads(path.read_text())
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    phases: dict[str, list[dict[str, Any]]] = {"M": [], "X": [], "i": []}
    for event in trace["traceEvents"]:
        phases[event["ph"]].append(event)
    return phases


def test_the_trace_has_an_event_for_each_chunk_on_its_lane(tmp_path: Path) -> None:
    """Times, samples and lanes are those that the executor reported."""
    plan, heard = planned(), []
    with listen(heard.append):
        plan.run()
    plan.timeline(tmp_path / "trace.json")
    phases = read(tmp_path / "trace.json")
    names = {e["tid"]: e["args"]["name"] for e in phases["M"]}
    assert list(names.values()) == ["cpu#1", "cpu#2", "cpu#3"]
    chunks = [e for e in heard if isinstance(e, ChunkDone)]
    wanted = sorted((e.device, e.start, e.stop, round(1e6 * e.seconds)) for e in chunks)
    got = sorted((names[e["tid"]], e["args"]["start"], e["args"]["stop"], round(e["dur"])) for e in phases["X"])
    assert [g[:3] for g in got] == [w[:3] for w in wanted]
    np.testing.assert_allclose([g[3] for g in got], [w[3] for w in wanted], atol=1)
    (whole,) = [1e6 * e.seconds for e in heard if isinstance(e, RunFinished)]
    assert all(0 <= e["ts"] and e["ts"] + e["dur"] <= whole + 1 for e in phases["X"])


def test_chunks_that_went_back_are_instants_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = lanes.Lane.compute, [0]

    def fails_once(self: Any, *args: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise MemoryError("as a test")
        return original(self, *args)

    monkeypatch.setattr(lanes.Lane, "compute", fails_once)
    plan = planned()
    plan.run()
    plan.timeline(tmp_path / "trace.json")
    (again,) = read(tmp_path / "trace.json")["i"]
    assert again["args"]["reason"] == "MemoryError: as a test"
    assert again["args"]["stop"] - again["args"]["start"] == 7
    covered = sorted((e["args"]["start"], e["args"]["stop"]) for e in read(tmp_path / "trace.json")["X"])
    assert [s for s, _ in covered] == [0, *[e for _, e in covered[:-1]]], "each sample once"


@pytest.mark.parametrize("n", [0, 1, 50])
def test_the_picture_shows_lanes_side_by_side(n: int, tmp_path: Path) -> None:
    """There is blue where chunks ran, and more lanes make a taller picture."""
    plan = planned(n)
    plan.run()
    plan.plot(tmp_path / "plan.png")
    one = shardmap.plan(torch.sin)(torch.randn(max(n, 1)))
    one.run()
    one.plot(tmp_path / "one.png")
    tall, low = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("plan", "one"))
    assert tall.shape[0] > low.shape[0]
    blue = (np.abs(low[..., :3] - np.array([0x2A, 0x6F, 0xB0]) / 255).max(-1) < 0.05).sum()
    assert blue > 100


def test_thousands_of_chunks_are_drawn_as_runs(tmp_path: Path) -> None:
    events: list[Any] = [RunStarted(5000, 5000, ("cpu",))]
    events += [ChunkDone("cpu", i, i + 1, 0.001, at=100 + 0.002 * (i + 1)) for i in range(5000)]
    events += [ChunkRedone("cpu", 3, 4, "memory", at=101.0), RunFinished(10.0, at=110.0)]
    run = timeline.history(events)
    merged = timeline._merged(run.bars)
    assert len(merged) <= timeline.MERGED
    assert (merged[0].start, merged[-1].stop) == (0, 5000)
    assert merged[0].began == pytest.approx(0.001)
    assert merged[-1].ended == pytest.approx(10.0)
    timeline.draw(tmp_path / "many.png", unplanned(5000, "cpu"), events)
    image = matplotlib.image.imread(tmp_path / "many.png")
    red = (np.abs(image[..., :3] - np.array([0xC8, 0x32, 0x1F]) / 255).max(-1) < 0.05).sum()
    assert red > 20, "the chunk that went back is marked"


@pytest.mark.parametrize("what", ["timeline", "plot"])
def test_before_the_run_there_is_nothing_to_show(what: str, tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match=rf"{what}\(\) shows what happened, and the plan has not run yet; call run\(\) first"):
        getattr(planned(), what)(tmp_path / "x.png")


@pytest.mark.parametrize(("what", "name"), [("timeline", "missing/x.json"), ("plot", "missing/x.png"), ("plot", "x.unknown")])
def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(what: str, name: str, tmp_path: Path) -> None:
    plan = planned()
    plan.run()
    with pytest.raises(errors.OptionError, match="cannot be written.*name another one") as caught:
        getattr(plan, what)(tmp_path / name)
    assert repr(str(tmp_path / name)) in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_failed_run_leaves_the_last_ones_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned()
    plan.run()

    def fails(self: Any, *args: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(lanes.Lane, "compute", fails)
    with pytest.raises(ValueError, match="broken"):
        plan.run()
    plan.timeline(tmp_path / "trace.json")
    assert read(tmp_path / "trace.json")["X"]
