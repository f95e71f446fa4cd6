"""Histories that end or are hidden inside a function: `detach_()`, scripted code, counted indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import shardmap
from shardmap import errors

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 3": {"chunk_size": 3},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "remat": {"remat": True, "chunk_size": 3},
}
W = torch.tensor([0.5, -1.5, 2.0], requires_grad=True)


def statement(row: Tensor) -> Tensor:
    y = row * W
    y.detach_()
    return y * row


def truncated(row: Tensor) -> Tensor:
    """Backpropagation through time that is cut at each step."""
    state = torch.zeros(3)
    for _ in range(3):
        state = torch.tanh(state + row * W * 0.1)
        state.detach_()
    return state * W


def then_written(row: Tensor) -> Tensor:
    y = torch.detach_(row * W)
    y.mul_(row)
    return y + W


def made_a_leaf_again(row: Tensor) -> Tensor:
    y = (row * W).detach_().requires_grad_()
    return torch.autograd.grad((y**2).sum(), y)[0] * row


def one_of_two(row: Tensor) -> Tensor:
    y, z = row * W, row.sin() * W
    z.detach_()
    return y * z


def gradients(y: Tensor, x: Tensor) -> list[Tensor]:
    found = torch.autograd.grad((y * y).sum(), (x, W), allow_unused=True)
    return [torch.zeros(3) if t is None else t for t in found]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize(
    "function", [statement, truncated, then_written, made_a_leaf_again, one_of_two]
)
def test_detached_in_place(function: Callable[[Tensor], Tensor], size: int, way: str) -> None:
    mapped = shardmap.vmap(function, **WAYS[way])
    for seed in (0, 1):
        x = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        y, expected = mapped(x), torch.stack([function(row) for row in x])
        torch.testing.assert_close(y, expected)
        for found, wanted in zip(gradients(y, x), gradients(expected, x), strict=True):
            torch.testing.assert_close(found, wanted)


@torch.jit.script
def scripted(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sin()


def test_optimised_scripts_are_refused_under_gradients_from_outside() -> None:
    x = torch.randn(5, 3)

    def function(row: Tensor) -> Tensor:
        return scripted(row, W) + row

    def own_gradient(row: Tensor) -> Tensor:
        return torch.autograd.grad(scripted(row, W).sum(), W)[0]

    for _ in range(4):
        scripted(x, W)  # TorchScript optimises what it has run, and keeps that

    with pytest.raises(errors.AutogradFunctionError, match=r"before it was scripted, take the"):
        shardmap.vmap(function)(x)
    expected = torch.stack([function(row) for row in x]).detach()
    with torch.no_grad():  # the remedies
        torch.testing.assert_close(shardmap.vmap(function)(x), expected)
    torch.testing.assert_close(
        shardmap.vmap(own_gradient)(x), torch.stack([own_gradient(row) for row in x])
    )
    torch.testing.assert_close(shardmap.vmap(lambda row: (row * W).sin() + row)(x), expected)


INDICES = torch.tensor([[0, 1, 0], [2, 0, 0], [3, 3, 3], [1, 2, 3], [0, 0, 0]])
TABLE = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()


def looked_up(index: Tensor) -> Tensor:
    return F.embedding(index, TABLE, scale_grad_by_freq=True)


def bag(index: Tensor) -> Tensor:
    return F.embedding_bag(index[None], TABLE, mode="sum", scale_grad_by_freq=True)[0]


@pytest.mark.filterwarnings("ignore::shardmap.errors.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", [looked_up, bag])
def test_an_index_is_counted_in_its_own_sample(
    function: Callable[[Tensor], Tensor], way: str
) -> None:
    y = shardmap.vmap(function, **WAYS[way])(INDICES)
    expected = torch.stack([function(index) for index in INDICES])
    torch.testing.assert_close(y, expected)
    (found,), (wanted,) = (torch.autograd.grad((t * t).sum(), (TABLE,)) for t in (y, expected))
    torch.testing.assert_close(found, wanted)


def test_a_table_that_is_scaled_as_it_is_read() -> None:
    """The remedies give what the loop gives where no row is looked up before it is scaled."""
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)) * 3
    index = torch.tensor([[0, 1], [2, 0], [3, 3]])
    with pytest.raises(errors.CapturedWriteError, match=r"scale the table before the call"):
        shardmap.vmap(lambda i: F.embedding(i, table, max_norm=1.0))(index)
    scaled = torch.renorm(table, 2.0, 0, 1.0)
    expected = torch.stack([F.embedding(i, table.clone(), max_norm=1.0) for i in index])
    torch.testing.assert_close(shardmap.vmap(lambda i: F.embedding(i, scaled))(index), expected)
