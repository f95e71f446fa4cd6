"""The README says only what runs: its code, its commands, and every row of its table."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import shardmap
from tests.oracle import assert_same

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_blocks(blocks: list[str]):
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(
            compile(block, "README.md", "exec"), namespace
        )  # as a reader would, one after the other


def test_python_blocks_run():
    local = [block for block in BLOCKS if '"ray"' not in block]
    assert len(local) >= 5
    run_blocks(local)


@pytest.mark.ray
def test_python_blocks_run_with_ray():
    assert any('"ray"' in block for block in BLOCKS)
    run_blocks(BLOCKS)


@dataclass(frozen=True)
class Row:
    """One line of the table: a function, its samples, and what each of the two makes of it."""

    what: str
    function: Callable[..., Any]
    batch: tuple[Any, ...]
    torch_func: str = "refused"
    shardmap: str = "equals the loop"


torch.manual_seed(0)
X, Y = torch.randn(5, 3), torch.randint(0, 2, (5,))
W = torch.randn(3, 2)
MODEL = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def module_gradient(x, y):
    return torch.autograd.grad(F.cross_entropy(MODEL(x), y), tuple(MODEL.parameters()))


def requires_grad(x):
    z = x.detach().requires_grad_()
    return torch.autograd.grad(z.sin().sum(), z)[0]


def write_inside(x):
    out = torch.zeros(3)
    for i in range(3):
        out[i] = x[i]
    return out


def data_dependent(x):
    return x if x.sum() > 0 else -x


ROWS = [
    Row(
        "`torch.autograd.grad(loss(model(x), y), tuple(model.parameters()))`, a plain module",
        module_gradient,
        (X, Y),
    ),
    Row(
        "`torch.autograd.functional.vjp`, `jacobian`, `hessian`",
        lambda x: (
            torch.autograd.functional.vjp(lambda w: x @ w, W, torch.ones(2))[1],
            torch.autograd.functional.jacobian(MODEL, x),
            torch.autograd.functional.hessian(lambda z: MODEL(z).square().sum(), x),
        ),
        (X,),
    ),
    Row("`x.detach().requires_grad_()`", requires_grad, (X,)),
    Row("`out = torch.zeros(3); out[i] = x[i]`", write_inside, (X,)),
    Row(
        'an argument that is no tensor, such as `"mean"`',
        lambda x, how: getattr(x, how)(),
        (X, "mean"),
    ),
    Row(
        "`torch.where(s > 0, s, v)`, `s` one float64 number, `v` a float32 vector",
        lambda s: torch.where(s > 0, s, torch.ones(2)),
        (torch.randn(5, dtype=torch.float64),),
        torch_func="float64, the loop has float32",
    ),
    Row(
        "`torch.func.grad`, `jacrev`, `jacfwd`, `hessian`",
        lambda x: (
            torch.func.grad(lambda z: MODEL(z).sum())(x),
            torch.func.jacrev(MODEL)(x),
            torch.func.jacfwd(MODEL)(x),
            torch.func.hessian(lambda z: MODEL(z).square().sum())(x),
        ),
        (X,),
        torch_func="equals the loop",
    ),
    Row("`if x.sum() > 0:`", data_dependent, (X,)),
]


def judge(vmap: Callable[..., Any], row: Row) -> str:
    """The verdict on `vmap` for a row, by comparison with the loop."""
    rows = [
        row.function(*(arg[i] if isinstance(arg, torch.Tensor) else arg for arg in row.batch))
        for i in range(5)
    ]
    expected = pytree.tree_map(lambda *leaves: torch.stack(leaves), *rows)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = vmap(row.function)(*row.batch)
    except (RuntimeError, ValueError):
        return "refused"
    for mine, loops in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        if mine.dtype != loops.dtype:
            return f"{str(mine.dtype)[6:]}, the loop has {str(loops.dtype)[6:]}"
        assert_same(mine, loops, row.what)
    return "equals the loop"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_a_row_of_the_table(row):
    assert f"| {row.what} | {row.torch_func} | {row.shardmap} |" in README
    assert judge(torch.func.vmap, row) == row.torch_func
    assert judge(shardmap.vmap, row) == row.shardmap


def test_the_table_has_no_other_row():
    table = README.partition("| inside the mapped function |")[2].partition("\n\n")[0]
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == len(ROWS)


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    assert targets
    missing = [
        target
        for target in targets
        if "://" not in target and not (Path(__file__).parent.parent / target).exists()
    ]
    assert missing == []
