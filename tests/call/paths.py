"""Helpers for tests of samples that take different paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunk 1": {"chunk_size": 1},
    "chunk 3": {"chunk_size": 3},
    "chunk N": {"chunk_size": 61},
    "two lanes": {"devices": ["cpu", "cpu"], "chunk_size": 7},
    "once": {"trace": "once"},
    "always": {"check": "always"},
    "off": {"check": "off"},
    "strict": {"strict": True, "max_paths": 100},
}


def batch(size: int, width: int = 3) -> Tensor:
    """Different samples."""
    return torch.randn(size, width, generator=torch.Generator().manual_seed(size))


def expected(function: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """The results of the loop."""
    return torch.stack([function(*row) for row in zip(*columns, strict=True)])
