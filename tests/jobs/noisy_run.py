"""A run of a noisy function that can be stopped, killed and looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

import shardmap
from shardmap.jobs.folder import state_of
from shardmap.run.base import ChunkDone, listen

ROOT = Path(__file__).parents[2]


MODULE = """
import torch
from shardmap.jobs import Dataset, Findings

def load(*, rows: int = 23):
    return Dataset({"x": torch.arange(3.0 * rows).view(rows, 3).remainder(7.0)})

def model(dataset):
    return torch.randn(3, 3)

def noisy(weight, x, *, steps: int = 1):
    for _ in range(steps):
        x = (weight @ x).sin() + 0.1 * x
    return {"noisy": x + torch.rand(3), "norm": x.norm()}

def report(outcome):
    rows = outcome.tensors()
    (outcome.folder / "norms.txt").write_text(str(rows["norm"].tolist()))
    return Findings("found", {"norm": float(rows["norm"].sum())})

def nothing(outcome):
    return None

def broken(outcome):
    raise LookupError("the user has to see this")
"""


CONFIG = """
data: {path: users_resume.load, init_args: {rows: 23}}
model: users_resume.model
function: users_resume.noisy
report: users_resume.report
randomness: different
devices: cpu
chunk_size: 4
seed: 5
output: runs/mine
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of the user's own, as the current directory."""
    (tmp_path / "users_resume.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def begin(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """A run in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "shardmap.jobs.cli", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(words: Sequence[str]) -> float:
    """Let a run end; its seconds."""
    began = time.monotonic()
    process = begin(words)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error.decode()
    return time.monotonic() - began


def state(folder: str = "runs/mine") -> str | None:
    found = state_of(Path(folder))
    return None if found is None else found["state"]


def rows(folder: str = "runs/mine") -> list[torch.Tensor]:
    store = shardmap.open_store(f"{folder}/results.zarr")
    return [store.read(k, 0, store.header.samples) for k in range(len(store.header.outputs))]


def findings(folder: str = "runs/mine") -> dict[str, object]:
    summary = json.loads(Path(folder, "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in ("seconds", "store")}


def stopped_after(sample: int) -> AbstractContextManager[None]:
    """A Ctrl-C when the chunk that ends there is computed."""

    def interrupt(event: object) -> None:
        if isinstance(event, ChunkDone) and event.stop == sample:
            raise KeyboardInterrupt

    return listen(interrupt)
