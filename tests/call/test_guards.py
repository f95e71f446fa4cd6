"""`trace="auto"` sees whatever changes a function between two calls, or records it each time."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import shardmap
from shardmap.call import automatic
from tests.call.changes import WAYS
from tests.call.runs import counting

for part in ("values", "objects", "surroundings", "modules", "settings"):
    importlib.import_module(f"tests.call.changes_of_{part}")
for part in ("found", "unspelled"):
    importlib.import_module(f"tests.call.changes_{part}")


def loop(f, rows):
    return torch.stack([f(r) for r in rows])


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("calls", [1, 2, 3, 6], ids="after{}".format)
def test_a_change_between_calls(name, calls):
    torch.manual_seed(0)
    way = WAYS[name]()
    batches = [torch.rand(3, 3) + 0.5 for _ in range(calls + 4)]
    try:
        f = next(way)
        mapped = shardmap.vmap(f, randomness="different")
        for rows in batches[:calls]:
            torch.testing.assert_close(mapped(rows), loop(f, rows))
        f = next(way)
        for rows in batches[calls:]:
            torch.testing.assert_close(mapped(rows), loop(f, rows))
            torch.testing.assert_close(
                shardmap.vmap(f, randomness="different")(rows), loop(f, rows)
            )
    finally:
        for _ in way:  # what was patched is put back
            pass


def test_there_are_enough_ways():
    assert len(WAYS) >= 80


@pytest.mark.parametrize("option", ["-c", "-"])
def test_a_function_without_a_file_sees_its_globals(option):
    text = (
        "import torch, shardmap\n"
        "scale = 1.0\n"
        "mapped = shardmap.vmap(lambda r: r * scale)\n"
        "for _ in range(4): mapped(torch.randn(5, 3))\n"
        "scale = 2.0\n"
        "rows = torch.randn(5, 3)\n"
        "assert torch.equal(mapped(rows), 2 * rows)\n"
    )
    arguments = [option, text] if option == "-c" else [option]
    subprocess.run([sys.executable, *arguments], input=text, text=True, check=True)


def test_each_thread_has_its_own_locals():
    local = threading.local()
    mapped = shardmap.vmap(lambda r: r * local.scale)
    wrong = []

    def work(scale):
        local.scale = scale
        rows = torch.randn(3, 4)
        if not torch.equal(mapped(rows), rows * scale):
            wrong.append(scale)

    for scale in (1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0):
        thread = threading.Thread(target=work, args=(scale,))
        thread.start()
        thread.join()
    assert not wrong


@pytest.mark.parametrize("transform", [shardmap.jacrev, shardmap.jacfwd, shardmap.hessian])
def test_derivatives_are_replayed_too(transform):
    scale = [2.0]

    def function(r):
        return (r * scale[0]).sin().sum()

    mapped = transform(function)
    own = {shardmap.jacrev: torch.func.jacrev, shardmap.jacfwd: torch.func.jacfwd}
    plain = own.get(transform, torch.func.hessian)
    runs = []
    for k in range(14):
        if k == 12:
            scale[0] = 3.0
        rows = torch.randn(4, 3, dtype=torch.float64)
        with counting(function) as calls:
            found = mapped(rows)
        runs.append(calls())
        torch.testing.assert_close(found, loop(plain(lambda r: (r * scale[0]).sin().sum()), rows))
    reasons = [r.why for known in automatic.known() for r in known.refused.values()]
    assert runs[4:12].count(0) >= 3, reasons
    assert runs[12] > 0


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))],
    ids=["linear", "sequential"],
)
def test_gradients_of_torchs_own_modules_are_replayed(model):
    text = shardmap.per_sample_grad(model, lambda out: out.sum()).plan(torch.randn(4, 3)).explain()
    assert "then replayed while what it reads is unchanged" in text


def test_gradients_of_a_model_that_changes():
    """The parameters are those that the model has at each call."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    gradients = shardmap.per_sample_grad(model, lambda out: out.sum())
    rows = torch.randn(5, 4)
    for change in (
        lambda: None,
        lambda: model[0].requires_grad_(False),
        lambda: model[0].requires_grad_(True),
        lambda: model.append(nn.Linear(3, 3)),
        lambda: setattr(model[1], "bias", None),
    ):
        change()
        for _ in range(3):
            found = gradients(rows)
            names = {name for name, p in model.named_parameters() if p.requires_grad}
            assert set(found) == names
            wanted = [p for p in model.parameters() if p.requires_grad]
            for i, row in enumerate(rows):
                expected = torch.autograd.grad(model(row).sum(), wanted)
                for name, one in zip(found, expected, strict=True):
                    torch.testing.assert_close(found[name][i], one)


def test_text_that_is_evaluated():
    mapped = shardmap.vmap(lambda r: eval("r * 2", {"r": r}))
    for _ in range(4):
        rows = torch.randn(3, 2)
        assert torch.equal(mapped(rows), rows * 2)
