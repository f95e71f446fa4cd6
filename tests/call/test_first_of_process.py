"""The first call of a process: what torch imports then runs inside the recording."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardmap

FUNCTIONS = {
    "a recurrent layer under torch.func.grad": (
        "layer = nn.LSTM(4, 3)",
        "torch.func.grad(lambda r: layer(r[None])[0].sin().sum())",
    ),
    "its parameters' gradient": (
        "layer = nn.GRU(4, 3)\nweights = {k: t.detach() for k, t in layer.named_parameters()}\n"
        "def loss(w, r): return functional_call(layer, w, (r[None],))[0].sin().sum()",
        "lambda r: torch.func.grad(loss)(weights, r)",
    ),
    "a Hessian": ("", "torch.func.hessian(lambda r: r.sin().prod())"),
    "a module that is imported inside": ("", "imports"),
    "a distribution": ("", "lambda r: torch.distributions.Normal(r, r.exp()).log_prob(2 * r)"),
}
MODULE = """
import torch
SCALE = [torch.tensor(getattr(torch, "pi"))]
def scaled(r):
    return r * SCALE[0]
"""
SCRIPT = """
import torch, shardmap
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
def imports(r):
    import imported_inside
    return imported_inside.scaled(r)
{setup}
function = {function}
mapped = shardmap.vmap(function)
for seed in range(6):
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    found = mapped(rows)
    wanted = pytree.tree_map(lambda *ts: torch.stack(ts), *[function(r) for r in rows])
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        torch.testing.assert_close(a, b)
    if seed == 3 and function is imports:
        import imported_inside
        imported_inside.SCALE[0] = torch.tensor(2.0)
from shardmap.call.automatic import known
assert [kept.confirmed for each in known() for kept in each.kept.values()] == [True]
"""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_first_call_of_a_process(name: str, tmp_path: Path) -> None:
    setup, function = FUNCTIONS[name]
    (tmp_path / "imported_inside.py").write_text(MODULE)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(setup=setup, function=function))
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wrapper_that_a_transform_has_left_behind_is_no_storage() -> None:
    """As recurrent layers leave in their lists of weights; the function may ask for memory."""
    left: list[torch.Tensor] = []

    def loss(r: torch.Tensor) -> torch.Tensor:
        left[:] = [r]
        return r.sin().sum()

    torch.func.grad(loss)(torch.ones(4))

    def function(r: torch.Tensor) -> torch.Tensor:
        return r * len(left) + WEIGHT.untyped_storage().nbytes()

    mapped = shardmap.vmap(function)
    for seed in range(4):
        rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(mapped(rows), rows + 16)


WEIGHT = torch.ones(4)
