"""What a reduction is, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reduction:
    """One way to combine results of samples."""

    name: str
    combine: Callable[[Tensor, Tensor], Tensor] | None = None
    """Of a reduction of the user's own."""
    finish: Callable[[Tensor], Tensor] | None = None
