"""Tests of a run's inputs: samples in files, classes, weights, samples of unequal shapes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmap
from shardmap.errors import ConfigError
from shardmap.jobs import weights
from shardmap.jobs.cli import main


@pytest.mark.parametrize("kind", ["npy", "safetensors", "several", "zarr", "named"])
def test_samples_in_files_are_those_in_memory(kind, tmp_path, monkeypatch):
    import zarr

    monkeypatch.chdir(tmp_path)
    x, y = torch.randn(7, 3), torch.randn(7)
    np.save("x.npy", x.numpy())
    np.save("y.npy", y.numpy())
    save_file({"x": x, "y": y}, "both.safetensors")
    save_file({"x": x[:4].clone(), "y": y[:4].clone()}, "a.safetensors")
    save_file({"x": x[4:].clone(), "y": y[4:].clone()}, "b.safetensors")
    zarr.save_group("group.zarr", x=x.numpy(), y=y.numpy())  # pyright: ignore[reportArgumentType]
    source = {
        "npy": "{path: x.npy, columns: [x]}",
        "safetensors": "both.safetensors",
        "several": "[a.safetensors, b.safetensors]",
        "zarr": "group.zarr",
        "named": "{path: {x: x.npy, y: y.npy}}",
    }[kind]
    if kind == "several":
        source = f"{{path: {source}}}"
    Path("run.yaml").write_text(
        f"source: {source}\nfunction: torch.sin\ncolumns: [x]\nchunk_size: 3\noutput: runs/files\n"
    )
    assert main(["run", "run.yaml"]) == 0
    assert torch.equal(shardmap.open_store("runs/files/results.zarr").read("result", 0, 7), x.sin())
    Path("next.yaml").write_text(
        "source: runs/files/results.zarr\nfunction: torch.neg\nreduce: sum\noutput: runs/next\n"
    )
    assert main(["run", "next.yaml"]) == 0
    torch.testing.assert_close(
        load_file("runs/next/outputs.safetensors")["result"], -x.sin().sum(0)
    )


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth"])
def test_a_class_is_constructed_and_its_weights_are_loaded(ending, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, layer = torch.randn(5, 3), torch.nn.Linear(3, 2)
    np.save("x.npy", x.numpy())
    if ending == "safetensors":
        save_file(layer.state_dict(), "layer.safetensors")
    else:
        torch.save(layer.state_dict(), f"layer.{ending}")
    named = "{path: torch.nn.Linear, init_args: {in_features: 3, out_features: 2}}"
    for key in ("model", "function"):
        Path("run.yaml").write_text(
            f"source: x.npy\n{key}: {named}\nweights: layer.{ending}\noutput: runs/{key}\n"
        )
        assert main(["run", "run.yaml"]) == 0
        torch.testing.assert_close(
            shardmap.open_store(f"runs/{key}/results.zarr").read("result", 0, 5), layer(x).detach()
        )


def test_a_model_that_needs_no_data_and_a_module_in_eval_mode(tmp_path, monkeypatch):
    (tmp_path / "users_made.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def scale(factor: float = 2.0):\n    return factor\n"
        "def times(factor, x, *, more: float = 1.0):\n    return factor * more * x\n"
        "class Dropped(nn.Module):\n"
        "    def forward(self, x):\n        return nn.functional.dropout(x, 0.5, self.training)\n"
    )
    monkeypatch.chdir(tmp_path)
    x = torch.randn(5, 3)
    np.save("x.npy", x.numpy())
    model = "{path: users_made.scale, init_args: {factor: 3}}"
    function = "{path: users_made.times, init_args: {more: 2}}"
    Path("run.yaml").write_text(
        f"source: x.npy\nmodel: {model}\nfunction: {function}\noutput: runs/made\n"
    )
    assert main(["run", "run.yaml"]) == 0
    assert torch.equal(shardmap.open_store("runs/made/results.zarr").read("result", 0, 5), 6 * x)
    Path("run.yaml").write_text(
        "source: x.npy\nfunction: users_made.Dropped\noutput: runs/dropped\n"
    )
    assert main(["run", "run.yaml"]) == 0
    assert torch.equal(shardmap.open_store("runs/dropped/results.zarr").read("result", 0, 5), x)
    words = ["run", "run.yaml", "--randomness", "different", "--output", "runs/training"]
    assert main(words) == 0  # what is said of its draws asks for its training mode
    found = shardmap.open_store("runs/training/results.zarr").read("result", 0, 5)
    assert torch.equal(torch.where(found == 0, found, 2 * x), found)
    assert 0 < (found == 0).sum() < found.numel()


def test_tied_weights_may_be_given_once_and_halves_widen(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4)
            self.head.weight = self.embed.weight

    state, module = Tied().state_dict(), Tied()
    once = {name: t for name, t in state.items() if name != "head.weight"}
    weights.load(module, once, "once")
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())
    assert module.head.weight is module.embed.weight
    halves = {name: t.half() for name, t in state.items()}
    weights.load(module, halves, "halves")
    assert all(
        torch.equal(t, state[name].half().float()) for name, t in module.state_dict().items()
    )
    with pytest.raises(
        ConfigError,
        match=r"different values for 'embed\.weight' and 'head\.weight', which are one tensor",
    ):
        weights.load(module, {**state, "head.weight": state["head.weight"] + 1}, "two")
    with pytest.raises(ConfigError, match="lacks 'embed.weight', 'head.weight'; save"):
        weights.load(module, {"head.bias": state["head.bias"]}, "none")


RAGGED = """
import shardmap, torch
from shardmap.jobs import Dataset
ROWS = [torch.arange(float(n)) + n for n in (3, 1, 4, 1, 5, 3, 2)]
def load():
    return Dataset({'x': shardmap.Ragged(ROWS), 'y': torch.arange(7.0)})
def both(x, y):
    return {'sum': x.sum() * y, 'twice': 2 * x}
def total(x, y):
    return {'sum': x.sum() * y, 'ends': x[[0, -1]]}
"""
ROWS = [torch.arange(float(n)) + n for n in (3, 1, 4, 1, 5, 3, 2)]


@pytest.fixture
def ragged(tmp_path, monkeypatch):
    """A configuration of samples of unequal shapes, in the folder that is current."""
    (tmp_path / "users_ragged.py").write_text(RAGGED)
    (tmp_path / "run.yaml").write_text(
        "data: users_ragged.load\nfunction: users_ragged.total\noutput: runs/ragged\n"
        "chunk_size: 2\n"
    )
    monkeypatch.chdir(tmp_path)


def test_results_of_unequal_shapes_are_gathered(ragged, capsys):
    both = ["--function", "users_ragged.both"]
    assert main(["run", "run.yaml", *both]) == 0
    said = capsys.readouterr().out
    assert "7 samples of unequal shapes and results, a map for each shape" in said
    found = load_file("runs/ragged/outputs.safetensors")
    torch.testing.assert_close(
        found.pop("sum"), torch.stack([row.sum() * i for i, row in enumerate(ROWS)])
    )
    assert found.keys() == {f"twice.{i}" for i in range(7)}
    assert all(torch.equal(found[f"twice.{i}"], 2 * row) for i, row in enumerate(ROWS))
    assert main(["resume", "runs/ragged"]) == 0
    assert "is complete" in capsys.readouterr().out
    for words, told in (
        (["verify", "runs/ragged"], "its outputs were gathered in memory"),
        (
            ["run", "run.yaml", *both, "--store", "store"],
            "output 1 has shape [1] for some samples and [5] for others",
        ),
        (["plan", "run.yaml", *both], "a plan is of equal results"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert told in error
    assert not Path("store").exists()


def test_samples_of_unequal_shapes_are_planned_stored_resumed_and_verified(ragged, capsys):
    assert main(["plan", "run.yaml"]) == 0
    assert "7 samples" in capsys.readouterr().out
    assert main(["run", "run.yaml"]) == 0
    store = shardmap.open_store("runs/ragged/results.zarr")
    assert store.header.units == 4
    torch.testing.assert_close(
        store.read("sum", 0, 7), torch.stack([row.sum() * i for i, row in enumerate(ROWS)])
    )
    assert torch.equal(store.read("ends", 0, 7), torch.stack([r[[0, -1]] for r in ROWS]))
    assert main(["verify", "runs/ragged", "--units", "4"]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 units recomputed: equal to the last bit" in out
    assert "the map agrees with the loop on 1 samples" in out
    for kind in ("zarr", "safetensors", "memmap"):
        words = ["run", "run.yaml", "--store", kind, "--store_kind", kind, "--output", f"r/{kind}"]
        assert main(words) == 0
        assert torch.equal(
            shardmap.open_store(kind).read("ends", 0, 7), torch.stack([r[[0, -1]] for r in ROWS])
        )
        capsys.readouterr()
        assert main(["resume", kind]) == 0


def test_a_stopped_run_over_unequal_shapes_goes_on(ragged, monkeypatch, capsys):
    from shardmap.call import shape_replay

    rows, seen = shape_replay.ShapeReplay.chunk_into, []

    def failing(self, size, start, *rest):
        seen.append(start)
        if len(seen) == 3:  # two units are written
            raise KeyboardInterrupt
        return rows(self, size, start, *rest)

    monkeypatch.setattr(shape_replay.ShapeReplay, "chunk_into", failing)
    assert main(["run", "run.yaml"]) != 0
    store = shardmap.open_store("runs/ragged/results.zarr")
    missing = store.missing()
    assert 0 < len(missing) < 4
    monkeypatch.undo()
    monkeypatch.chdir(store.url.partition("/runs/")[0])
    seen.clear()
    assert main(["resume", "runs/ragged"]) == 0
    store = shardmap.open_store(store.url)
    assert not store.missing()
    assert torch.equal(store.read("ends", 0, 7), torch.stack([r[[0, -1]] for r in ROWS]))
