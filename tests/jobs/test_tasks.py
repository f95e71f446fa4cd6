"""Runs of every task, against torch.func on the same samples.

Their outputs are written, planned, verified and resumed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import shardmap
from shardmap.jobs import Dataset, Outcome
from shardmap.jobs.cli import main
from shardmap.run.base import ChunkDone, listen

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int = 5):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.last = nn.Linear(width, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))

def parameters():
    return {"a": torch.tensor([1.0, -2.0, 0.5]), "b": torch.tensor(0.3)}

def squared(params, x):
    return ((params["a"] * x).sin().sum() + params["b"]) ** 2

def well(x):
    return (x.square().sum() - 1) ** 2 + x.prod()

def scaled(factor, x):
    return factor * well(x)

def two(x, y):
    return x * y.sum() + x.sin()
"""
N = 7


class Net(nn.Module):
    """The same network, for the comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Net:
    """The network whose weights lie in the current directory, beside samples."""
    (tmp_path / "users_tasks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    net = Net()
    save_file(net.state_dict(), "net.safetensors")
    save_file(
        {"x": torch.randn(N, 3), "y": torch.randint(4, (N,)), "v": torch.randn(N, 3)},
        "samples.safetensors",
    )
    return net


def samples() -> dict[str, Tensor]:
    return load_file("samples.safetensors")


def write(task: str, *lines: str) -> None:
    text = [
        f"task: {task}",
        "source: samples.safetensors",
        "chunk_size: 3",
        "devices: cpu",
        "output: runs/task",
        *lines,
    ]
    Path("run.yaml").write_text("\n".join(text) + "\n")


NET = ("model: users_tasks.Net", "weights: net.safetensors")
LOSS = ("columns: [x, y]", "loss: torch.nn.functional.cross_entropy")


def outputs(folder: str = "runs/task") -> dict[str, Tensor]:
    file = Path(folder, "outputs.safetensors")
    if file.exists():
        return load_file(file)
    return Outcome(
        Dataset({"x": torch.zeros(1)}),
        None,
        shardmap.open_store(f"{folder}/results.zarr"),
        Path(folder),
    ).tensors()


def gradients(net: Net) -> dict[str, Tensor]:
    """By torch.func, as its documentation has it."""
    given, params = samples(), {name: p.detach() for name, p in net.named_parameters()}

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, params, (x,)), y)

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        params, given["x"], given["y"]
    )


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_gradients_of_a_module_by_name(net: Net) -> None:
    write("per_sample_grad", *NET, *LOSS)
    assert main(["run", "run.yaml"]) == 0
    close(outputs(), gradients(net))
    plan = json.loads(Path("runs/task/plan.json").read_text())
    assert [(lane["rows"], lane["chunk"], lane["chunks"]) for lane in plan["lanes"]] == [(7, 3, 3)]


def test_chosen_gradients_in_one_row_and_a_class_as_function_and_loss(net: Net) -> None:
    lines = (
        "function: users_tasks.Net",
        "weights: net.safetensors",
        "columns: [x, y]",
        "loss: {path: torch.nn.CrossEntropyLoss}",
    )
    write("per_sample_grad", *lines, 'params: "*.weight"', "flat: true")
    assert main(["run", "run.yaml"]) == 0
    expected = gradients(net)
    close(
        outputs(),
        {
            "result": torch.cat(
                [expected[name].flatten(1) for name in ("first.weight", "last.weight")], dim=1
            )
        },
    )


def test_arguments_reach_the_loss(net: Net) -> None:
    write(
        "per_sample_grad",
        *NET,
        "columns: [x, y]",
        "loss: {path: torch.nn.functional.cross_entropy, init_args: {label_smoothing: 0.2}}",
    )
    assert main(["run", "run.yaml", "--output", "runs/smooth"]) == 0
    given = samples()
    loss = F.cross_entropy(net(given["x"][2]), given["y"][2], label_smoothing=0.2)
    expected = torch.autograd.grad(loss, net.last.bias)[0]
    torch.testing.assert_close(
        outputs("runs/smooth")["last.bias"][2], expected, rtol=1e-4, atol=1e-6
    )


def test_gradients_of_a_function_of_parameters(net: Net) -> None:
    write(
        "per_sample_grad",
        "model: users_tasks.parameters",
        "function: users_tasks.squared",
        "columns: [x]",
    )
    assert main(["run", "run.yaml"]) == 0
    import users_tasks  # pyright: ignore[reportMissingImports]

    expected = torch.func.vmap(torch.func.grad(users_tasks.squared), in_dims=(None, 0))(
        users_tasks.parameters(), samples()["x"]
    )
    close(outputs(), expected)


@pytest.mark.parametrize("method", ["auto", "reverse", "forward"])
def test_jacobians_of_a_module(method: str, net: Net) -> None:
    write("jacobian", *NET, "columns: [x]", f"method: {method}")
    assert main(["run", "run.yaml"]) == 0
    close(outputs(), {"result": torch.func.vmap(torch.func.jacrev(net))(samples()["x"]).detach()})


def test_jacobians_by_chosen_columns(net: Net) -> None:
    write("jacobian", "function: users_tasks.two", "columns: [x, v]", "argnums: [1, 0]")
    assert main(["run", "run.yaml"]) == 0
    import users_tasks  # pyright: ignore[reportMissingImports]

    given = samples()
    by_v, by_x = torch.func.vmap(torch.func.jacrev(users_tasks.two, argnums=(1, 0)))(
        given["x"], given["v"]
    )
    close(outputs(), {"0": by_v, "1": by_x})


def test_hessians_and_their_products(net: Net) -> None:
    import users_tasks  # pyright: ignore[reportMissingImports]

    given = samples()
    expected = torch.func.vmap(torch.func.hessian(users_tasks.well))(given["x"])
    write("hessian", "function: users_tasks.well", "columns: [x]")
    assert main(["run", "run.yaml"]) == 0
    close(outputs(), {"result": expected})
    write("hvp", "function: users_tasks.well", "columns: [x, v]")
    assert main(["run", "run.yaml", "--output", "runs/products"]) == 0
    products = (expected @ given["v"].unsqueeze(2)).squeeze(2)
    close(
        outputs("runs/products"),
        {"0": torch.stack([users_tasks.well(x) for x in given["x"]]), "1": products},
    )
    write("hvp", "function: users_tasks.scaled", "columns: [y, x, v]", "argnums: 1")
    assert main(["run", "run.yaml", "--output", "runs/scaled"]) == 0
    torch.testing.assert_close(
        outputs("runs/scaled")["1"], given["y"].unsqueeze(1) * products, rtol=1e-4, atol=1e-5
    )


def test_reductions_of_gradients_alone_and_together(net: Net) -> None:
    expected = gradients(net)
    flat = torch.cat([g.flatten(1) for g in expected.values()], dim=1)  # [N, P]
    norms = flat.norm(dim=1)
    clipped = flat * (0.5 / norms).clamp(max=1).unsqueeze(1)
    write("per_sample_grad", *NET, *LOSS)
    for number, (text, wanted) in enumerate(
        {
            "mean": {name: g.mean(0) for name, g in expected.items()},
            "norm": {"result": norms},
            "gram": {"result": flat @ flat.T},
            "second_moment": {name: g.square().mean(0) for name, g in expected.items()},
            "{average: mean, norms: norm}": {
                f"average.{name}": g.mean(0) for name, g in expected.items()
            }
            | {"norms": norms},
            "[sum, norm]": {f"sum.{name}": g.sum(0) for name, g in expected.items()}
            | {"norm": norms},
        }.items()
    ):
        assert main(["run", "run.yaml", "--reduce", text, "--output", f"runs/{number}"]) == 0
        close(outputs(f"runs/{number}"), wanted)
    assert (
        main(
            [
                "run",
                "run.yaml",
                "--reduce",
                "{name: clipped_sum, max_norm: 0.5}",
                "--output",
                "runs/clipped",
            ]
        )
        == 0
    )
    found = outputs("runs/clipped")
    torch.testing.assert_close(
        torch.cat([found[name].flatten() for name in expected]),
        clipped.sum(0),
        rtol=1e-4,
        atol=1e-6,
    )


def test_noise_comes_from_the_runs_seed(net: Net) -> None:
    write(
        "per_sample_grad",
        *NET,
        *LOSS,
        "reduce: {name: clipped_sum, max_norm: 0.5, noise_multiplier: 2.0}",
    )
    for seed, name in (("1", "one"), ("1", "again"), ("2", "two")):
        assert main(["run", "run.yaml", "--seed", seed, "--output", f"runs/{name}"]) == 0
    one, again, two = (outputs(f"runs/{name}") for name in ("one", "again", "two"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("task", "lines"),
    [
        ("per_sample_grad", (*NET, *LOSS)),
        ("jacobian", (*NET, "columns: [x]")),
        ("hessian", ("function: users_tasks.well", "columns: [x]")),
        ("hvp", ("function: users_tasks.well", "columns: [x, v]")),
    ],
)
def test_every_task_is_planned_verified_and_gone_on_with(
    task: str, lines: tuple[str, ...], net: Net, capsys: Any
) -> None:
    write(task, *lines)
    assert main(["plan", "run.yaml", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 workers, each like this machine" in out
    assert not Path("runs").exists()

    def interrupt(event: object) -> None:
        if isinstance(event, ChunkDone) and event.stop == 6:
            raise KeyboardInterrupt

    with listen(interrupt):
        assert main(["run", "run.yaml"]) == 130
    assert main(["resume", "runs/task"]) == 0
    assert main(["run", "run.yaml", "--output", "runs/whole"]) == 0
    found, whole = outputs(), outputs("runs/whole")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    capsys.readouterr()
    assert main(["verify", "runs/task", "--all"]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 units recomputed: equal to the last bit\n" in out
    assert re.search(r"the map agrees with the loop on \d samples", out)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_task_of_no_sample_and_of_one(rows: int, net: Net) -> None:
    np.save("x.npy", samples()["x"][:rows].numpy())
    write("jacobian", *NET)
    assert main(["run", "run.yaml", "--source", "x.npy"]) == 0
    assert outputs()["result"].shape == (rows, 4, 3)


def test_parameters_that_are_not_there_are_one_line(net: Net, capsys: Any) -> None:
    write("per_sample_grad", *NET, *LOSS, "params: '*.wieght'")
    assert main(["run", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "params='*.wieght' fits no parameter of Net" in error
    assert not Path("runs").exists()
