"""The conformance suite's table: functions of one sample, and what a map of each must show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
Function = Callable[[Tensor], Any]

SAMPLES = 23
"""Different samples in each batch: a prime."""


@dataclass(frozen=True)
class Case:
    """A function of one sample, and the batch that it is mapped over."""

    function: Function
    shape: tuple[int, ...]
    """Shape of one sample's result."""
    dtype: torch.dtype
    weights: Sequence[Tensor]
    """Captured tensors: gradients to them are compared as well."""
    orders: int
    """Gradients compared: 0 for none, 1 for first, 2 for second gradients as well."""
    refused: type[Exception] | None
    """The error that the map raises instead, until it is mended."""
    positive: bool
    """True if all values are between 0.5 and 2."""
    plain: Function | None
    """The same in plain python, which the loop runs instead: for operators that torch has to
    compile, or cannot differentiate twice itself."""
    options: dict[str, Any]
    """Options of the map in every way."""

    def batch(self) -> Tensor:
        """Different samples: of integers from -3 to 3, booleans, or normal or positive values."""
        generator = torch.Generator().manual_seed(len(self.function.__name__))
        shape = (SAMPLES, *self.shape)
        if self.dtype is torch.bool:
            return torch.rand(shape, generator=generator) > 0.5
        if not self.dtype.is_floating_point and not self.dtype.is_complex:
            low = 0 if self.positive else -3
            return torch.randint(low, 4, shape, generator=generator, dtype=self.dtype)
        if self.positive:
            return torch.rand(shape, generator=generator, dtype=self.dtype) * 1.5 + 0.5
        return torch.randn(shape, generator=generator, dtype=self.dtype)


class Cases(list[Case]):
    """The cases of one file, which its functions enter by a decorator."""

    def __call__(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        weights: Sequence[Tensor] = (),
        orders: int = 2,
        refused: type[Exception] | None = None,
        positive: bool = False,
        plain: Function | None = None,
        **options: Any,
    ) -> Callable[[Function], Function]:
        """A decorator that enters a function; samples have 4 values unless `shape` says so."""

        def enter(function: Function) -> Function:
            shown = shape or (4,)
            case = Case(function, shown, dtype, weights, orders, refused, positive, plain, options)
            self.append(case)
            return function

        return enter


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A captured weight that requires grad."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
