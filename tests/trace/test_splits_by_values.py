"""`tensor_split` by a tensor, whose numbers torch reads from memory where no operator shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from tests.call.ways import WAYS

Split = Callable[[Tensor, Tensor], Sequence[Tensor]]
SPLITS: dict[str, Split] = {
    "method": lambda r, at: r.tensor_split(at),
    "function": lambda r, at: torch.tensor_split(r, at, 0),
    "by name": lambda r, at: torch.tensor_split(r, tensor_indices_or_sections=at),
    "operator": lambda r, at: torch.ops.aten.tensor_split(r, at),
    "overload": lambda r, at: torch.ops.aten.tensor_split.tensor_indices_or_sections(r, at, 0),
}


def summed(split: Split) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda r, at: torch.stack([p.sum() * (k + 1) for k, p in enumerate(split(r, at))])


@pytest.mark.parametrize("way", [*WAYS, "each", "off"])
@pytest.mark.parametrize("name", SPLITS)
def test_indices_that_change_between_calls(name: str, way: str) -> None:
    options: dict[str, Any] = WAYS.get(way, {"trace": way} if way == "each" else {"check": way})
    at, f = torch.tensor([1, 3]), summed(SPLITS[name])
    mapped = shardmap.vmap(lambda r: f(r, at), **options)
    for values in ([1, 3], [1, 3], [2, 5], [2, 5], [0, 1], [4, 2]):
        at.copy_(torch.tensor(values))
        x = torch.randn(5, 6)
        torch.testing.assert_close(mapped(x), torch.stack([f(r, at) for r in x]))


@pytest.mark.parametrize("way", [*WAYS, "each", "off"])
@pytest.mark.parametrize("name", SPLITS)
def test_indices_that_differ_by_sample(name: str, way: str) -> None:
    options: dict[str, Any] = WAYS.get(way, {"trace": way} if way == "each" else {"check": way})
    f = summed(SPLITS[name])
    mapped = shardmap.vmap(f, **options)
    rows = torch.tensor([[2, 4], [2, 4], [3, 5], [2, 4], [0, 6], [2, 2], [2, 4]])
    for size in (7, 1, 3, 7):
        x = torch.randn(size, 6, dtype=torch.float64, requires_grad=True)
        at = rows[torch.randperm(7)[:size]]
        found, expected = mapped(x, at), torch.stack([f(r, i) for r, i in zip(x, at, strict=True)])
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            *[torch.autograd.grad(y.square().sum(), x) for y in (found, expected)]
        )


def test_a_number_of_parts() -> None:
    parts = torch.tensor(2)
    mapped = shardmap.vmap(lambda r: r.tensor_split(parts)[0])
    for number in (2, 2, 3, 1):
        parts.fill_(number)
        x = torch.randn(3, 6)
        torch.testing.assert_close(mapped(x), torch.stack([r.tensor_split(parts)[0] for r in x]))


def test_errors_are_torchs() -> None:
    x, at = torch.randn(3, 6), torch.tensor([1, 3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="dtype of long"):
        shardmap.vmap(lambda r: r.tensor_split(at)[0])(x)
