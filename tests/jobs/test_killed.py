"""Runs that are killed go on, and end as if they had not been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shardmap
from shardmap.jobs.cli import main
from shardmap.run.base import ChunkDone, listen
from tests.jobs.noisy_run import (
    ROOT,
    begin,
    findings,
    finished,
    rows,
    state,
    stopped_after,
)
from tests.jobs.noisy_run import workplace as workplace

LONG = ["--data.init_args.rows", "2003", "--chunk_size", "2", "--function.init_args.steps", "30"]


def killed_again_and_again(kills: int, seed: int) -> None:
    """A run that is killed at random moments and resumed ends as one that was left alone."""
    whole = finished(["run", "run.yaml", *LONG, "--output", "runs/whole"])
    moments, killed, number = random.Random(seed), 0, 0
    while (
        killed < kills
    ):  # a run that is through before it has been killed often enough is followed by another one
        number += 1
        killed += killed_until_through(f"runs/run{number}", kills - killed, whole, moments)
        compare(f"runs/run{number}", "runs/whole")


def killed_until_through(folder: str, kills: int, whole: float, moments: random.Random) -> int:
    """Kill and go on, so many times unless it ends before; how often it was killed."""
    killed = committed = 0
    while state(folder) != "complete":
        process = begin(
            ["run", "run.yaml", *LONG, "--output", folder]
            if state(folder) is None
            else ["resume", folder]
        )
        if killed < kills:
            time.sleep(moments.uniform(0, 0.8 * whole))
            process.kill()
        _, error = process.communicate(timeout=120)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, error.decode()
            assert state(folder) == "complete"
            break
        killed += 1
        if Path(folder, "results.zarr/manifest.jsonl").exists():
            there = len(shardmap.open_store(f"{folder}/results.zarr").receipts())
            assert there >= committed  # nothing that was committed is lost
            committed = there
            if there < 1002:
                assert state(folder) == "unfinished"
    return killed


def compare(folder: str, whole: str) -> None:
    assert all(torch.equal(a, b) for a, b in zip(rows(folder), rows(whole), strict=True))
    assert findings(folder) == findings(whole)
    assert Path(folder, "norms.txt").read_text() == Path(whole, "norms.txt").read_text()
    assert {p.name for p in Path(folder).iterdir()} == {p.name for p in Path(whole).iterdir()}
    assert all(
        json.loads(line)
        for line in Path(folder, "log.jsonl").read_text().splitlines()
        if line.endswith("}")
    )


def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(workplace: Path) -> None:
    killed_again_and_again(2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [2, 3])
def test_a_run_killed_ten_times_ends_as_one_that_was_not(seed: int, workplace: Path) -> None:
    killed_again_and_again(10, seed)


@pytest.mark.parametrize("words", [[], ["--reduce", "mean", "--report", "null"]])
def test_a_run_that_is_killed_in_the_middle_of_its_map_is_unfinished_and_goes_on(
    words: list[str], workplace: Path, capsys
) -> None:
    script = (
        "import os, signal\nfrom shardmap.jobs.cli import main\nfrom shardmap.run.base "
        "import ChunkDone, listen\n"
        "def kill(event):\n    if isinstance(event, ChunkDone) and event.stop == 12:\n "
        "       os.kill(os.getpid(), signal.SIGKILL)\n"
        f"with listen(kill):\n    main(['run', 'run.yaml', *{words!r}])\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{workplace}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    killed = subprocess.run(
        [sys.executable, "-c", script], check=False, env=environment, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert state() == "unfinished"
    assert not Path("runs/mine/summary.json").exists()
    seen: list[int] = []
    with listen(
        lambda event: (
            seen.append(event.stop - event.start) if isinstance(event, ChunkDone) else None
        )
    ):
        assert main(["resume", "runs/mine"]) == 0
    said = capsys.readouterr().out
    assert state() == "complete"
    assert main(["run", "run.yaml", *words, "--output", "runs/whole"]) == 0
    if words:
        assert sum(seen) == 23
        assert "the run starts from the beginning" in said
        one, other = (load_file(f"runs/{name}/outputs.safetensors") for name in ("mine", "whole"))
        assert one.keys() == other.keys() == {"noisy", "norm"}
        assert all(torch.equal(one[name], other[name]) for name in one)
    else:
        assert 0 < sum(seen) < 23
        assert " of 6 units are there, and stay" in said
        assert all(torch.equal(a, b) for a, b in zip(rows(), rows("runs/whole"), strict=True))


def test_what_was_killed_before_it_was_a_store_is_made_anew(workplace: Path) -> None:
    with stopped_after(12):
        assert main(["run", "run.yaml"]) == 130
    Path("runs/mine/results.zarr/manifest.jsonl").unlink()
    with Path("runs/mine/log.jsonl").open("a") as log:
        log.write('{"time": 1, "ev')
    assert main(["resume", "runs/mine"]) == 0
    assert len(rows()[0]) == 23
    lines = Path("runs/mine/log.jsonl").read_text().splitlines()
    assert sum(line.startswith('{"time": 1, "ev') and not line.endswith("}") for line in lines) == 1
    assert json.loads(lines[-1])["event"] == "finished"
