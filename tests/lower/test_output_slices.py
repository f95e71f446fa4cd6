"""Outputs that are put together of parts are written part by part, and are what the loop gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import shardmap
from shardmap.lower.output_slices import place
from tests import oracle

W, V = torch.randn(4, 3), torch.randn(5, 4)


def part_used_elsewhere(x: torch.Tensor) -> torch.Tensor:
    """A recurrence: each state is a part, and read by the next step, which takes views of it."""
    states = [x]
    for _ in range(3):
        states.append((V[:4, :3] @ states[-1].view(3)).tanh()[:3] + states[-1])
    return torch.stack(states, 1)


def jacobian(x: torch.Tensor) -> Any:
    return torch.autograd.functional.jacobian(lambda v: V @ torch.tanh(W @ v), x)


def hessian(x: torch.Tensor) -> Any:
    return torch.autograd.functional.hessian(lambda v: (W @ v).sin().prod(), x)


FUNCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "stack": lambda x: torch.stack([x.sin(), x.cos(), x.exp()]),
    "stack along the last": lambda x: torch.stack([x.sin(), x.cos()], -1),
    "cat": lambda x: torch.cat([x.sin(), W @ x, x[:1]]),
    "cat along the second": lambda x: torch.cat([x.outer(x), x.outer(W @ x)], 1),
    "a part twice": lambda x: (lambda s: torch.stack([s, x * 2, s]))(x.sin()),
    "a part and an output": lambda x: (lambda s: (s, torch.stack([s, x])))(x.sin()),
    "the input as a part": lambda x: torch.stack([x, x * 2, x]),
    "a part that no sample changes": lambda x: torch.stack([x.sin(), W.sum(0), torch.ones(3)]),
    "stacks side by side": lambda x: torch.cat(
        [torch.stack([x.sin(), x]), torch.stack([x.cos(), x * 3, x])]
    ),
    "two outputs of the same parts": lambda x: (
        lambda a, b: (torch.stack([a, b]), torch.cat([b, a]))
    )(x.sin(), x.cos()),
    "other dtypes": lambda x: torch.cat([x.sin(), x.double(), (x > 0).long()]),
    "a part without elements": lambda x: torch.cat([x.sin(), x[:0], x]),
    "numbers": lambda x: torch.stack([x.sum(), x.prod(), x[0]]),
    "transposed": lambda x: torch.stack([x.sin(), x.cos()]).t(),
    "written later": lambda x: torch.stack([x.sin(), x.cos()]).mul_(2),
    "a part that is written later": lambda x: (lambda s: (torch.stack([s, x]), s.add_(1)))(x.sin()),
    "views as parts": lambda x: torch.cat([x.outer(x).t().reshape(-1), x.outer(x)[1]]),
    "recurrence": part_used_elsewhere,
    "jacobian": jacobian,
    "hessian": hessian,
}


@pytest.mark.parametrize("samples", [0, 1, 3, 7])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_parts_side_by_side_equal_the_loop(name: str, samples: int) -> None:
    """In chunks, whose results are written in place."""
    x, function = torch.randn(samples, 3), FUNCTIONS[name]
    for options in (
        {"chunk_size": 1},
        {"chunk_size": 2},
        {"chunk_size": 3},
        {"chunk_size": 2, "out_dims": -1},
    ):
        wanted = pytree.tree_leaves(oracle.loop(function, out_dims=options.get("out_dims", 0))(x))
        for got, want in zip(
            pytree.tree_leaves(shardmap.vmap(function, **options)(x)), wanted, strict=True
        ):
            oracle.assert_same(got, want, f"{name}, {options}")


@pytest.mark.parametrize("name", ["stack", "cat", "jacobian", "stacks side by side"])
def test_nothing_is_put_side_by_side_any_more(name: str) -> None:
    """The joining calls are gone, and with them the memory of the parts."""
    plan = shardmap.plan(FUNCTIONS[name])(torch.randn(7, 3))
    program = plan.job.lowerings.outline("cpu")
    joined = [call.op for call in program.chunk].count
    left = [
        call.op for call in place(program, [v for v in program.outputs if v.mapped]).calls
    ].count
    joins = torch.ops.aten.stack.default, torch.ops.aten.cat.default
    assert sum(map(joined, joins)) > sum(map(left, joins))


def test_parts_are_not_alive_all_at_once() -> None:
    """A Jacobian of 200 rows needs a few rows beside its result, not all of them again."""
    inner, outer = torch.randn(64, 32), torch.randn(200, 64)
    x = torch.randn(11, 32)
    plan = shardmap.plan(
        lambda v: torch.autograd.functional.jacobian(lambda u: outer @ torch.tanh(inner @ u), v)
    )(x)
    (lane,) = plan.lanes
    assert lane.memory.chunk_bytes(11) < 11 * 200 * 32 * 4 / 10
