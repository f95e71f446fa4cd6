"""Batches of different samples, and the plain loop over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def batch(size: int) -> Tensor:
    """Different samples."""
    return torch.randn(size, 5, generator=torch.Generator().manual_seed(size + 1))


def loop(f: Callable[..., Any], *columns: Tensor) -> list[Tensor]:
    """The plain loop's results, stacked."""
    rows = [f(*row) for row in zip(*columns, strict=True)]
    rows = [r if isinstance(r, tuple) else (r,) for r in rows]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def assert_close(found: Any, expected: list[Tensor]) -> None:
    """Every sample of every output has the loop's values, dtype and shape."""
    found = found if isinstance(found, tuple | list) else (found,)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
