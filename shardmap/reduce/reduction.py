"""Reductions as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reduction:
    """A reduction over the samples."""

    name: str
    combine: Callable[[Tensor, Tensor], Tensor] | None = None
    """Function of a user-defined reduction; None for one of ours."""
    finish: Callable[[Tensor], Tensor] | None = None
