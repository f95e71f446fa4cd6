"""Bags of embedding rows and rows of a largest norm, compared with the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.rules.against_loop import below, check, real
from tests.rules.everywhere import everywhere

TWO, ENDED = torch.tensor([0, 3]), torch.tensor([0, 3, 5])
BAGS: dict[str, Callable[[str], Callable[..., Any]]] = {
    "padding": lambda mode: lambda i, w: F.embedding_bag(i, w, TWO, mode=mode, padding_idx=1),
    "ended": lambda mode: (
        lambda i, w: F.embedding_bag(i, w, ENDED, mode=mode, include_last_offset=True)
    ),
    "matrix": lambda mode: lambda i, w: F.embedding_bag(i.view(2, 3), w, mode=mode, padding_idx=-1),
    "empty": lambda mode: (
        lambda i, w: F.embedding_bag(i, w, torch.tensor([0, 2, 2]), mode=mode, padding_idx=0)
    ),
}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", BAGS)
def test_bags(name: str, mode: str) -> None:
    everywhere(BAGS[name](mode), below(5, 6), real(5, 3))


@pytest.mark.parametrize("padding", [None, 1])
def test_weighted_bags(padding: int | None) -> None:
    def bags(i: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(i, w, TWO, per_sample_weights=s, mode="sum", padding_idx=padding)

    everywhere(bags, below(5, 6), real(5, 3), real(6))


def test_bags_whose_offsets_differ_by_sample() -> None:
    def bags(i: torch.Tensor, w: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), second])
        return F.embedding_bag(i, w, offsets, mode="mean", padding_idx=2)

    everywhere(bags, below(5, 6), real(5, 3), below(6, 1))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("end", [4, 6])
def test_bags_of_single_precision_end_as_the_kernel_says(mode: str, end: int) -> None:
    def bags(i: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor([0, 3, end])
        return F.embedding_bag(i, w, ends, mode=mode, include_last_offset=True)

    single = real(5, 3, dtype=torch.float32)
    everywhere(bags, below(5, 6), single, gradient=end == 6, tolerance=1e-6)


def test_gradients_by_frequency() -> None:
    def scaled(i: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.embedding(i, w, scale_grad_by_freq=True, padding_idx=1)

    everywhere(scaled, below(5, 4), real(5, 3))


@pytest.mark.parametrize("kind", [1.0, 2.0, float("inf")])
def test_rows_of_a_largest_norm(kind: float) -> None:
    everywhere(
        lambda i, w: F.embedding(i, w.clone(), max_norm=1.0, norm_type=kind),
        below(5, 4),
        real(5, 3),
    )
    everywhere(
        lambda i, w: torch.ops.aten.embedding_renorm(w, i, 1.0, kind),
        below(5, 2, 2),
        real(5, 3),
        gradient=False,
    )


def test_bags_in_half_precision() -> None:
    check(
        lambda i, w: F.embedding_bag(i, w, TWO, mode="mean", padding_idx=1),
        below(5, 6),
        real(5, 3, dtype=torch.bfloat16),
        tolerance=1e-2,
    )
