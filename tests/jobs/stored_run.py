"""A run whose outputs go to a store."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import shardmap
from shardmap.run.base import ChunkDone, listen

ROOT = Path(__file__).parents[2]


GRADIENTS = str(ROOT / "configs" / "digits_gradients")


MODULE = """
import torch
from shardmap.jobs import Dataset, Findings

def load(*, rows: int = 23, shift: float = 0.0):
    return Dataset({"x": torch.arange(3.0 * rows).view(rows, 3) + shift})

def model(dataset):
    return torch.randn(3)

def noisy(weight, x):
    return {"noisy": (x * weight).sin() + torch.rand(3), "norm": x.norm()}

def report(outcome):
    noisy, norm = outcome.rows()
    headline = f"{type(outcome.outputs).__name__} of {len(noisy)} rows"
    return Findings(headline, {"norm": float(norm.sum())})
"""


CONFIG = """
data: {path: users_store.load, init_args: {rows: 23}}
model: users_store.model
function: users_store.noisy
report: users_store.report
randomness: different
devices: cpu
chunk_size: 4
seed: 5
output: runs/mine
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of the user's own, as the current directory."""
    (tmp_path / "users_store.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def forget_modules() -> None:
    """Forget the run's modules, as a new process would: their files have changed."""
    for name in [name for name in sys.modules if name.endswith(".users_store")]:
        del sys.modules[name]


def chunks() -> tuple[list[tuple[int, int]], object]:
    """The chunks that are computed inside the context."""
    seen: list[tuple[int, int]] = []
    return seen, listen(
        lambda event: (
            seen.append((event.start, event.stop)) if isinstance(event, ChunkDone) else None
        )
    )


def rows(url: str = "store") -> list[torch.Tensor]:
    store = shardmap.open_store(url)
    return [store.read(k, 0, store.header.samples) for k in range(len(store.header.outputs))]
