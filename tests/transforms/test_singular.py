"""Derivatives at singular matrices and at ties, where torch has more than one formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import shardmap
from tests.transforms.functions import PAIRS, loop

Tensor = torch.Tensor

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"chunk_size": 2},
    "lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
}
MATRICES = torch.tensor(
    [[[3, 1], [1, 2]], [[1, 1], [1, 1]], [[0, 1], [0, 1]], [[2, 0], [0, 3]], [[0, 0], [0, 0]]],
    dtype=torch.float64,
)
DETERMINANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "det": torch.linalg.det,
    "within": lambda m: torch.linalg.det(m.sin()) * m,
    "on a path": lambda m: torch.det(m) if m[0, 0] < 3 else m.sum(),
    "product": torch.prod,
    "products": lambda m: m.cumprod(0),
}
FUNC = torch.func


def with_and_without_grad(found: Callable[[], Any], expected: Any) -> None:
    for grad in (True, True, False, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(found(), expected, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transform", PAIRS)
@pytest.mark.parametrize("name", DETERMINANTS)
def test_jacobians(name: str, transform: str, way: str) -> None:
    function, (ours, theirs) = DETERMINANTS[name], PAIRS[transform]
    mapped = ours(function, **WAYS[way])
    with_and_without_grad(lambda: mapped(MATRICES), loop(theirs(function), MATRICES))


@pytest.mark.parametrize("way", WAYS)
def test_products_and_gradients(way: str) -> None:
    vectors = torch.arange(1.0, 6, dtype=torch.float64)
    products = shardmap.vjp(torch.linalg.det, **WAYS[way])

    def product(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        value, back = FUNC.vjp(torch.linalg.det, m)[:2]
        return value, back(v)[0]  # pyright: ignore[reportCallIssue]

    expected = loop(product, MATRICES, vectors)
    with_and_without_grad(lambda: products(MATRICES, vectors), expected)

    def loss(p: Tensor, m: Tensor) -> Tensor:
        return torch.linalg.det(m + p)

    zeros = torch.zeros(2, 2, dtype=torch.float64)
    gradients = shardmap.per_sample_grad(loss, **WAYS[way])
    expected = loop(lambda m: FUNC.grad(loss)(zeros, m), MATRICES)
    with_and_without_grad(lambda: gradients(zeros, MATRICES), expected)
    assert not gradients(zeros, MATRICES).requires_grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_ties_of_second_derivatives(reduction: str, way: str) -> None:
    """torch.func decomposes the gradient of `huber_loss`, which has no forward formula."""
    x = torch.tensor([[1.5, 0.2], [1, 2], [-1, 1], [0, -1]], dtype=torch.float64)

    def function(r: Tensor) -> Tensor:
        return F.huber_loss(r, torch.zeros_like(r), reduction=reduction)

    mapped = shardmap.hessian(function, **WAYS[way])
    expected = loop(FUNC.hessian(function), x)
    with_and_without_grad(lambda: mapped(x), expected)

    def both(r: Tensor, s: Tensor) -> Tensor:
        return F.huber_loss(r * s, torch.zeros_like(r), reduction=reduction)

    mapped = shardmap.hessian(both, argnums=(0, 1), seed_chunk_size=1, **WAYS[way])
    ones = torch.ones_like(x)
    expected = loop(FUNC.hessian(both, argnums=(0, 1)), x, ones)
    with_and_without_grad(lambda: mapped(x, ones), expected)
