"""`segment_reduce` and repeated indices, compared with the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from tests.rules.against_loop import check, distinct, real
from tests.rules.everywhere import everywhere

REDUCTIONS = ["sum", "mean", "max", "min", "prod"]


def over(reduce: str, **options: Any) -> Callable[..., torch.Tensor]:
    """A reduction of rows over segments of two, three, none and one of them."""
    lengths = torch.tensor([2, 3, 0, 1])
    return lambda x: torch.segment_reduce(x, reduce, lengths=lengths, unsafe=True, **options)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_segments_that_samples_share(reduce: str) -> None:
    everywhere(over(reduce, initial=0.5), real(6, 2))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_segments_of_each_sample(reduce: str) -> None:
    def reduced(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([2, 3, 1])[order]
        return torch.segment_reduce(x, reduce, lengths=lengths)

    everywhere(reduced, real(6), distinct(3, 3))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_offsets_of_rows(reduce: str) -> None:
    offsets = torch.tensor([[0, 1, 4], [0, 3, 4]])

    def reduced(x: torch.Tensor) -> torch.Tensor:
        return torch.segment_reduce(x, reduce, offsets=offsets, axis=1, unsafe=True)

    everywhere(reduced, real(2, 4, 3))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_ties_zeros_and_missing_numbers(reduce: str) -> None:
    rows = torch.tensor(
        [
            [1.0, 1.0, 2.0, 2.0, -3.0, 2.0],
            [0.0, 2.0, 0.0, 3.0, 0.0, 4.0],
            [torch.nan, 2.0, 3.0, torch.nan, 5.0, 0.0],
            [torch.inf, 2.0, -torch.inf, 1.0, 5.0, 0.0],
        ],
        dtype=torch.float64,
    )
    weights = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64)

    def gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        out = over(reduce)(x)
        return out.detach(), torch.autograd.grad((out * weights).sum(), x)[0]

    for mine, theirs in zip(
        shardmap.vmap(gradient, strict=True)(rows),
        zip(*map(gradient, rows), strict=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, torch.stack(theirs), equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"trace": "once"}, {"trace": "each"}])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_ties_under_gradients_from_outside(
    reduce: str, shared: bool, options: dict[str, Any]
) -> None:
    """The kernel divides the gradient of a tie only if it is positive."""
    rows = torch.tensor(
        [[1.0, 1, 0, 2, 2, 5], [3, 1, 2, 2, 2, 5], [0, 0, 0, 0, 0, 0]], dtype=torch.float64
    ).unsqueeze(-1) * torch.tensor([1.0, -1.0], dtype=torch.float64)
    lengths = torch.tensor([[2, 3, 0, 1], [1, 0, 5, 0], [0, 2, 2, 2]])
    lengths = lengths[:1].expand(3, 4) if shared else lengths

    def over(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return torch.segment_reduce(x, reduce, lengths=n, initial=0.5, unsafe=True)

    mapped = shardmap.vmap(over, in_dims=(0, None if shared else 0), strict=True, **options)
    for _ in range(4):
        for sign in (1.0, -1.0):
            cotangents = sign * torch.arange(1.0, 25, dtype=torch.float64).view(3, 4, 2).cos()
            mine, theirs = (rows.clone().requires_grad_() for _ in range(2))
            looped = torch.stack([over(x, n) for x, n in zip(theirs, lengths, strict=True)])
            looped.backward(cotangents)
            found = mapped(mine, lengths[0] if shared else lengths)
            found.backward(cotangents)
            torch.testing.assert_close(found, looped)
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    lengths = torch.tensor([[2, 1], [1, 1]])
    with pytest.raises(RuntimeError, match="lengths"):
        shardmap.vmap(lambda x, n: torch.segment_reduce(x, "sum", lengths=n))(
            torch.randn(2, 3), lengths
        )


def test_repeated_indices_of_a_known_number() -> None:
    def repeated(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        counts = torch.tensor([1, 0, 3, 2])[order]
        return torch.repeat_interleave(x, counts, dim=0, output_size=6)

    check(repeated, real(4, 2), distinct(4, 4))
