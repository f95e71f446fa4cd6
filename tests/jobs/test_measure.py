"""Tests of a run's measurements: seconds and memory by lane, beside the plan."""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from shardmap.jobs.measure import Peaks
from tests.jobs.demos import CONFIGS


def test_plan_and_measurement_are_by_lane_and_cover_every_sample(tmp_path):
    # In a process of its own: taking memory again that was used and freed leaves no trace.
    words = [
        "--devices",
        '["cpu", "cpu"]',
        "--chunk_size",
        "100",
        "--model.init_args.epochs",
        "0",
        "--report",
        "null",
    ]
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "shardmap.jobs.cli",
        "run",
        str(CONFIGS / "digits_gradients"),
        *words,
        "--output",
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    plan, took = (
        json.loads((folder / name).read_text()) for name in ("plan.json", "measured.json")
    )
    assert [lane["name"] for lane in plan["lanes"]] == list(took["lanes"]) == ["cpu#1", "cpu#2"]
    assert [lane["device"] for lane in plan["lanes"]] == ["cpu", "cpu"]
    assert sum(lane["rows"] for lane in plan["lanes"]) == took["samples"] == plan["samples"] == 1797
    assert all(
        lane["predicted_peak_bytes"] > 0 and lane["predicted_seconds"] > 0 for lane in plan["lanes"]
    )
    assert "Operators by cost" in plan["explain"]
    assert (folder / "plan.txt").read_text() == plan["explain"] + "\n"
    chunks = sorted(
        (c["start"], c["stop"]) for lane in took["lanes"].values() for c in lane["chunks"]
    )
    assert [a for a, _ in chunks] == [0, *[b for _, b in chunks[:-1]]]
    assert chunks[-1][1] == 1797
    assert all(
        lane["seconds"] == pytest.approx(sum(c["seconds"] for c in lane["chunks"]))
        for lane in took["lanes"].values()
    )
    results = 1797 * 5050 * 4  # the gradients, float32
    assert all(0.8 * results < lane["peak_bytes"] < 3 * results for lane in took["lanes"].values())
    events = json.loads((folder / "timeline.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(chunks)


@pytest.mark.parametrize("after_more", [False, True])
def test_a_peak_is_found_also_where_more_was_in_use_before(after_more):
    size = 256 << 20
    if after_more:
        torch.ones(2 * size // 4)  # sets the process's record, and is freed
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what tests before have freed must not leave while this one looks
    with Peaks(["cpu"]) as peaks:
        block = torch.ones(size // 4)
        time.sleep(0.1)
        del block
    assert 0.9 * size < peaks.peak_bytes["cpu"] < 1.2 * size
