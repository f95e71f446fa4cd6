"""Graphs of the CPU that only pretend, and what their tests share.

A pretended graph keeps the captured function, with the memory and the numbers that it had, and
calls it again at each replay: what a graph reads elsewhere, and what it overwrites, is wrong here
as it would be on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

W = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Pretended:
    """Graphs of the CPU."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.captures: list[int] = []
        """Rows of the first result, by capture."""
        self.replays = 0
        self.fails: Exception | None = None
        self.wrong_from = 1 << 30
        """Replays from which the results are wrong."""
        self.running = 0
        self.of_the_caller = False

    def capturing(self) -> bool:
        """True inside a graph of the caller's."""
        return self.of_the_caller

    def pool(self, device: torch.device) -> object:
        """No memory of its own."""
        return object()

    def warmed(self, device: torch.device, function: Callable[[], Sequence[Tensor]]) -> Any:
        """The function's results."""
        return function()

    def captured(
        self, device: torch.device, pool: object, function: Callable[[], Sequence[Tensor]]
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Memory that a replay fills: a capture computes nothing."""
        if self.fails is not None:
            raise self.fails
        outs = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in function()]
        self.captures.append(outs[0].shape[0] if outs[0].dim() else 0)

        def replay() -> None:
            assert not self.running, "two replays at once"
            self.running += 1
            self.replays += 1
            for o, t in zip(outs, function(), strict=True):
                o.copy_(t if self.replays < self.wrong_from else t + 1)
            self.running -= 1

        return replay, outs

    def mark(self, device: torch.device) -> object:
        """Nothing runs behind."""
        return "mark"

    def after(self, device: torch.device, mark: object) -> None:
        """Nothing to wait for."""
        assert mark == "mark"


def function(row: Tensor) -> tuple[Tensor, Tensor]:
    """A number and a table for each sample."""
    return torch.tanh(row @ W).sum(), torch.outer(row, row.sin())
