"""A run whose outputs go to a store."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import shardmap
from shardmap.jobs.cli import main
from shardmap.jobs.config import bind, load
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


@pytest.mark.parametrize("kind", ["zarr", "safetensors", "memmap"])
def test_a_store_holds_what_the_run_without_one_saves_and_says_how_it_was_made(
    kind: str, workplace: Path, capsys
) -> None:
    assert main(["run", "run.yaml"]) == 0
    assert main(["run", "run.yaml", "--store", "store", "--store_kind", kind]) == 0
    said = capsys.readouterr().out
    assert "ZarrStore of 23 rows" in said
    assert f"{kind.capitalize()}Store of 23 rows" in said
    assert "written to runs/mine-2, the outputs to store" in said
    kept, stored = rows("runs/mine/results.zarr"), rows()
    assert torch.equal(stored[0], kept[0])
    assert torch.equal(stored[1], kept[1])
    assert not Path("runs/mine-2/results.zarr").exists()
    assert not list(Path("runs").glob("*/outputs.safetensors"))
    summary = json.loads(Path("runs/mine-2/summary.json").read_text())
    assert (summary["store"], summary["units"]) == (str(workplace / "store"), 6)
    header = shardmap.open_store("store").header
    assert [spec.name for spec in header.outputs] == ["noisy", "norm"]
    assert header.attributes["function"] == "users_store.noisy"
    assert header.attributes["configuration"]["data"]["init_args"] == {"rows": 23, "shift": 0.0}
    assert header.attributes["configuration_hash"] == bind(load("run.yaml")).config.digest()
    assert header.attributes["versions"]["torch"] == torch.__version__
