"""The timeline and the picture of a run say what happened in it."""

from __future__ import annotations

import dataclasses
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
    return shardmap.plan(lambda r: r.sin(), devices=DEVICES, chunk_size=7, **options)(
        torch.randn(n, 4)
    )


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The trace's events by phase."""
    trace = json.loads(path.read_text())
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    phases: dict[str, list[dict[str, Any]]] = {"M": [], "X": [], "i": []}
    for event in trace["traceEvents"]:
        phases[event["ph"]].append(event)
    return phases


def threads(phases: dict[str, list[dict[str, Any]]]) -> dict[int, str]:
    """The lanes by thread, in the order in which they are to be shown."""
    order = {
        e["tid"]: e["args"]["sort_index"] for e in phases["M"] if e["name"] == "thread_sort_index"
    }
    names = {e["tid"]: e["args"]["name"] for e in phases["M"] if e["name"] == "thread_name"}
    assert set(order) == set(names)
    return {tid: names[tid] for tid in sorted(names, key=order.__getitem__)}


def colour(path: Path, code: int) -> Any:
    """True for each pixel of a picture that has this colour."""
    image = matplotlib.image.imread(path)[..., :3]
    return np.abs(image - np.array([code >> 16, code >> 8 & 255, code & 255]) / 255).max(-1) < 0.05


def test_the_trace_has_an_event_for_each_chunk_on_its_lane(tmp_path: Path) -> None:
    """Times, samples and lanes are those that the executor reported."""
    plan, heard = planned(), []
    with listen(heard.append):
        plan.run()
    plan.timeline(tmp_path / "trace.json")
    phases = read(tmp_path / "trace.json")
    names = threads(phases)
    assert list(names.values()) == ["cpu#1", "cpu#2", "cpu#3"]
    chunks = [e for e in heard if isinstance(e, ChunkDone)]
    wanted = sorted((e.device, e.start, e.stop, round(1e6 * e.seconds)) for e in chunks)
    got = sorted(
        (names[e["tid"]], e["args"]["start"], e["args"]["stop"], round(e["dur"]))
        for e in phases["X"]
    )
    assert [g[:3] for g in got] == [w[:3] for w in wanted]
    np.testing.assert_allclose([g[3] for g in got], [w[3] for w in wanted], atol=1)
    (whole,) = [1e6 * e.seconds for e in heard if isinstance(e, RunFinished)]
    assert all(0 <= e["ts"] and e["ts"] + e["dur"] <= whole + 1 for e in phases["X"])


def test_chunks_that_went_back_are_instants_with_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    covered = sorted(
        (e["args"]["start"], e["args"]["stop"]) for e in read(tmp_path / "trace.json")["X"]
    )
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
    assert colour(tmp_path / "one.png", 0x2A6FB0).sum() > 100


def many(gap: float = 0.0) -> list[Any]:
    """5,000 chunks of a millisecond on one lane, one of which came again.

    `gap` seconds pass in the middle.
    """
    events: list[Any] = [RunStarted(5000, 5000, ("cpu",))]
    events += [
        ChunkDone("cpu", i, i + 1, 0.001, at=100 + 0.002 * (i + 1) + (gap if i >= 2500 else 0.0))
        for i in range(5000)
    ]
    return [
        *events,
        ChunkRedone("cpu", 3, 4, "memory", at=101.0),
        RunFinished(10.0 + gap, at=110.0 + gap),
    ]


def test_thousands_of_chunks_are_drawn_together_and_gaps_are_kept(tmp_path: Path) -> None:
    run = timeline.history(many(gap=2.0))
    spans = timeline._merged(run.bars, narrow=0.02)
    assert [chunks for _, _, chunks in spans] == [2500, 2500]
    np.testing.assert_allclose([s[:2] for s in spans], [(0.001, 5.0), (7.001, 12.0)])
    assert [c for _, _, c in timeline._merged(run.bars, narrow=1e-4)] == [1] * 5000, (
        "what can be seen is drawn"
    )
    timeline.draw(tmp_path / "many.png", unplanned(5000, "cpu"), many(gap=2.0))
    assert colour(tmp_path / "many.png", 0xC8321F).sum() > 20, "the chunk that went back is marked"
    row = colour(tmp_path / "many.png", 0x548FC6)
    row = row[row.sum(1).argmax()]
    filled = np.flatnonzero(row)
    (middle,) = np.flatnonzero(np.diff(filled) > 20)
    width = filled[-1] - filled[0]
    assert (filled[middle] - filled[0]) / width == pytest.approx(5 / 12, abs=0.01)
    assert (filled[middle + 1] - filled[0]) / width == pytest.approx(7 / 12, abs=0.01)


def test_a_wide_chunk_between_narrow_ones_stays_by_itself() -> None:
    ends = [(0.0, 0.1), (0.1, 0.2), (0.2, 5.0), (5.0, 5.1), (5.1, 5.2), (9.0, 9.1)]
    bars = [
        timeline.Bar("cpu", i, i + 1, began, ended, ended - began)
        for i, (began, ended) in enumerate(ends)
    ]
    assert timeline._merged(bars, narrow=0.5) == [
        (0.0, 0.2, 2),
        (0.2, 5.0, 1),
        (5.0, 5.2, 2),
        (9.0, 9.1, 1),
    ]
    assert timeline._merged([], narrow=0.5) == []


def test_chunks_in_flight_side_by_side_follow_each_other(tmp_path: Path) -> None:
    """A GPU gets its next chunk while it computes one.

    Viewers drop events of a thread that overlap; seconds are those reported.
    """
    events = [
        RunStarted(30, 3, ("cuda:0",)), ChunkDone("cuda:0", 0, 10, 1.0, at=51.0),
        ChunkDone("cuda:0", 10, 20, 1.9, at=52.0), ChunkDone("cuda:0", 20, 30, 1.1, at=53.3),
        RunFinished(3.5, at=53.5),
    ]  # fmt: skip
    timeline.write(tmp_path / "trace.json", events)
    got = [
        (e["ts"], e["ts"] + e["dur"], e["args"]["seconds"])
        for e in read(tmp_path / "trace.json")["X"]
    ]
    np.testing.assert_allclose(got, [(0, 1e6, 1.0), (1e6, 2e6, 1.9), (2.2e6, 3.3e6, 1.1)])


def test_events_of_one_thread_never_overlap_by_rounding(tmp_path: Path) -> None:
    at, events = 12345.678901, [RunStarted(500, 500, ("cuda:0",))]
    for i in range(500):
        at += 1e-6 * (1 + i * 0.7654321)
        events.append(ChunkDone("cuda:0", i, i + 1, 1.0, at=at))  # type: ignore[arg-type]
    timeline.write(tmp_path / "trace.json", [*events, RunFinished(1.0, at=at)])  # type: ignore[list-item]
    chunks = read(tmp_path / "trace.json")["X"]
    for one, following in zip(chunks, chunks[1:], strict=False):
        assert round(1000 * (one["ts"] + one["dur"])) <= round(1000 * following["ts"])
        assert one["dur"] >= 0


@torch.library.custom_op("shardmap_timeline_test::inner", mutates_args=())
def inner(t: torch.Tensor) -> torch.Tensor:
    """An operator that maps."""
    return shardmap.vmap(torch.sin, devices=["cpu", "cpu"], chunk_size=1)(t)


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
def test_maps_inside_operators_are_no_part_of_the_run(tmp_path: Path) -> None:
    plan = shardmap.plan(lambda r: inner(r), chunk_size=3)(torch.randn(5, 2))
    plan.run()
    plan.timeline(tmp_path / "trace.json")
    plan.plot(tmp_path / "plan.png")
    phases = read(tmp_path / "trace.json")
    assert list(threads(phases).values()) == ["cpu"]
    assert [(e["args"]["start"], e["args"]["stop"]) for e in phases["X"]] == [(0, 3), (3, 5)]


def test_a_run_that_did_not_end_and_an_empty_one(tmp_path: Path) -> None:
    """Without an end the clock begins with the first chunk.

    Lanes that were not announced are there all the same.
    """
    events = [
        RunStarted(4, 2, ("cpu",)),
        ChunkDone("late", 0, 2, 0.5, at=8.0),
        ChunkRedone("cpu", 2, 4, "lost", at=7.75),
    ]
    timeline.write(tmp_path / "trace.json", events)
    phases = read(tmp_path / "trace.json")
    assert list(threads(phases).values()) == ["cpu", "late"]
    assert [(e["ts"], e["dur"]) for e in phases["X"]] == [(0, 5e5)]
    assert [(e["ts"], e["s"], e["args"]) for e in phases["i"]] == [
        (2.5e5, "t", {"start": 2, "stop": 4, "reason": "lost"})
    ]
    timeline.write(
        tmp_path / "trace.json",
        [RunStarted(0, 1, ("cpu",)), ChunkDone("cpu", 0, 0, 0.0, at=1.0), RunFinished(0.0, at=1.0)],
    )
    (empty,) = read(tmp_path / "trace.json")["X"]
    assert empty["name"] == "no samples"


def test_lanes_of_one_device_take_turns(tmp_path: Path) -> None:
    """Each is expected to end when its device does, as the plan's total says."""
    one = unplanned(10, "cpu").lanes[0]
    lanes = tuple(
        dataclasses.replace(one, name=name, device=device, seconds=2.0)
        for name, device in (("a#1", "a"), ("a#2", "a"), ("b", "b"))
    )
    split = dataclasses.replace(unplanned(10, "cpu"), lanes=lanes)
    timeline.draw(
        tmp_path / "x.svg",
        split,
        [RunStarted(10, 1, ("b",)), ChunkDone("b", 0, 10, 1.0, at=1.0), RunFinished(1.0, at=1.0)],
    )
    text = (tmp_path / "x.svg").read_text()
    assert text.count("<!-- 4.0 s predicted -->") == 2
    assert text.count("<!-- 2.0 s predicted -->") == 1
    assert "; 4.0 s predicted -->" in text
    assert text.count("<!-- no chunks -->") == 2


def test_a_prediction_far_beyond_the_run_is_cut_and_written_out(tmp_path: Path) -> None:
    """The picture's scale is that of the run: its chunks fill at least a third of the width."""
    split = unplanned(10, "cpu")
    split = dataclasses.replace(split, lanes=(dataclasses.replace(split.lanes[0], seconds=1000.0),))
    timeline.draw(
        tmp_path / "x.svg",
        split,
        [
            RunStarted(10, 1, ("cpu",)),
            ChunkDone("cpu", 0, 10, 1.0, at=1.0),
            RunFinished(1.0, at=1.0),
        ],
    )
    timeline.draw(
        tmp_path / "x.png",
        split,
        [
            RunStarted(10, 1, ("cpu",)),
            ChunkDone("cpu", 0, 10, 1.0, at=1.0),
            RunFinished(1.0, at=1.0),
        ],
    )
    assert (
        colour(tmp_path / "x.png", 0x2A6FB0).any(0).sum()
        > 0.3 * matplotlib.image.imread(tmp_path / "x.png").shape[1]
    )
    text = (tmp_path / "x.svg").read_text()
    assert "16.7 min predicted" in text
    assert "10 samples in 1.0 s, 10 per second" in text


@pytest.mark.parametrize("what", ["timeline", "plot"])
def test_before_the_run_there_is_nothing_to_show(what: str, tmp_path: Path) -> None:
    with pytest.raises(
        errors.OptionError,
        match=rf"{what}\(\) shows what happened, and the plan has not run yet; call run\(\) first",
    ):
        getattr(planned(), what)(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("what", "name"),
    [("timeline", "missing/x.json"), ("plot", "missing/x.png"), ("timeline", "null\0byte.json")],
)
def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(
    what: str, name: str, tmp_path: Path
) -> None:
    plan = planned()
    plan.run()
    with pytest.raises(
        errors.OptionError, match="cannot be written: .*; name one in a folder that is there"
    ) as caught:
        getattr(plan, what)(tmp_path / name)
    assert f"plan.{what}({str(tmp_path / name)!r})" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x.unknown", "x", "x.json"])
def test_a_picture_of_no_known_kind_is_refused(name: str, tmp_path: Path) -> None:
    plan = planned()
    plan.run()
    with pytest.raises(
        errors.OptionError, match=r"says which kind of picture to write; end it in \.png"
    ):
        plan.plot(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_has_the_name_is_complete(
    error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted, or on a full disk, the file of before stays, and nothing half-written beside
    it."""
    plan, path = planned(), tmp_path / "trace.json"
    plan.run()
    path.write_text("before")

    def fails(self: Path, target: Path) -> None:
        raise error

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else errors.OptionError):
        plan.timeline(path)
    assert [(name, (tmp_path / name).read_text()) for name in os.listdir(tmp_path)] == [
        ("trace.json", "before")
    ]
    monkeypatch.undo()
    plan.timeline(path)
    assert os.listdir(tmp_path) == ["trace.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask, "as any other file of the user's"


def test_a_failed_run_leaves_the_last_ones_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned()
    plan.run()

    def fails(self: Any, *args: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(lanes.Lane, "compute", fails)
    with pytest.raises(ValueError, match="broken"):
        plan.run()
    plan.timeline(tmp_path / "trace.json")
    assert read(tmp_path / "trace.json")["X"]
