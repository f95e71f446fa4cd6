"""The scope of the steps of a random program, and their registration.

A step is a function of a `Scope`; it returns source text, or None where nothing at hand fits it. It
need not be careful: the generator runs each line on every row and takes back those that raise, blow
up or return something unusable.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32)

Step = Callable[["Scope"], "str | None"]
STEPS: list[tuple[float, Step]] = []


class Scope:
    """The data that a step may read: the tensors of the first row by name, and the dice."""

    def __init__(
        self,
        rng: random.Random,
        env: dict[str, Any],
        names: list[str],
        owned: Callable[[str], bool],
        serial: int,
    ) -> None:
        self.rng, self.env, self.names, self.owned, self.serial = rng, env, names, owned, serial
        self.new_names: list[str] = []

    def tensor(self, name: str) -> torch.Tensor:
        """The first row's value."""
        return self.env[name]

    def pick(self, test: Callable[[torch.Tensor], bool] = lambda t: True) -> str | None:
        """A name whose tensor passes `test`, later ones more often."""
        fits = [n for n in self.names if self._passes(n, test)]
        return self.rng.choices(fits, [1 + i for i in range(len(fits))])[0] if fits else None

    def _passes(self, name: str, test: Callable[[torch.Tensor], bool]) -> bool:
        try:
            return test(self.env[name])
        except (
            RuntimeError
        ):  # a view that autograd has given up on after a write to its base may not even be asked
            return False

    def float(self, test: Callable[[torch.Tensor], bool] = lambda t: True) -> str | None:
        """A floating-point tensor that passes `test`."""
        return self.pick(lambda t: t.is_floating_point() and test(t))

    def target(self, test: Callable[[torch.Tensor], bool] = lambda t: True) -> str | None:
        """A tensor to write to: made inside the program, hardly ever a mapped input."""
        fits = [n for n in self.names if self.owned(n) and self._passes(n, test)]
        return self.rng.choice(fits) if fits else None

    def like(
        self, shape: torch.Size, test: Callable[[torch.Tensor], bool] = lambda t: True
    ) -> str | None:
        """A tensor that broadcasts to `shape`."""

        def fits(t: torch.Tensor) -> bool:
            try:
                return torch.broadcast_shapes(t.shape, shape) == shape and test(t)
            except RuntimeError:
                return False

        return self.pick(fits)

    def new(self) -> str:
        """A fresh name."""
        name = f"v{self.serial + len(self.new_names)}"
        self.new_names.append(name)
        return name

    def dim(self, name: str) -> int:
        """One of the dimensions, counted from either end."""
        ndim = self.tensor(name).dim()
        return self.rng.randrange(-ndim, ndim)

    def shape(self) -> tuple[int, ...]:
        """A small shape."""
        return tuple(self.rng.choice((1, 2, 3, 4)) for _ in range(self.rng.randrange(4)))


def step(weight: float = 1.0) -> Callable[[Step], Step]:
    """Registers a step with its relative frequency."""

    def register(function: Step) -> Step:
        STEPS.append((weight, function))
        return function

    return register


def is_int(t: torch.Tensor) -> bool:
    """True if `t` can index."""
    return t.dtype in INTS


def has_dims(n: int) -> Callable[[torch.Tensor], bool]:
    """A test for exactly `n` dimensions."""
    return lambda t: t.dim() == n


def at_least(n: int) -> Callable[[torch.Tensor], bool]:
    """A test for `n` dimensions or more, none empty."""
    return lambda t: t.dim() >= n and t.numel() > 0
