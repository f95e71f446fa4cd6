"""Writes in place to mapped arguments that are parts of one tensor."""

from __future__ import annotations

import pytest
import torch

import shardmap
from shardmap import errors


def _written(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a.add_(1.0)
    return a * b


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}, {"trace": "once"}, {"trace": "each"}],
)
def test_parts_that_do_not_overlap_may_be_written(options: dict) -> None:
    ours, loops = (torch.arange(24.0).view(6, 4) for _ in range(2))
    mapped = shardmap.vmap(_written, **options)
    for _ in range(4):
        want = torch.stack([_written(*rows) for rows in zip(*loops.split(3), strict=True)])
        torch.testing.assert_close(mapped(*ours.split(3)), want)
        torch.testing.assert_close(ours, loops)


@pytest.mark.parametrize("options", [{}, {"trace": "once"}, {"trace": "each"}])
def test_parts_that_overlap_are_refused(options: dict) -> None:
    big = torch.arange(24.0).view(6, 4)
    for a, b in ((big[:3], big[2:5]), (big[2:5], big[:3]), (big[:, :2], big[:, 2:])):
        with pytest.raises(errors.CapturedWriteError, match="another argument"):
            shardmap.vmap(_written, **options)(a, b)
    torch.testing.assert_close(big, torch.arange(24.0).view(6, 4))
    mapped = shardmap.vmap(_written, **options)
    mapped(*big.clone().split(3))
    with pytest.raises(errors.CapturedWriteError, match="another argument"):
        mapped(big[:3], big[2:5])
