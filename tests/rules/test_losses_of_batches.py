"""Losses whose kernels have a batch of their own, compared with the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.rules.against_loop import below, real
from tests.rules.everywhere import everywhere


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("listed", [True, False])
def test_ctc(reduction: str, listed: bool) -> None:
    inputs, lengths = ((6, 5), (3, 2)) if listed else (torch.tensor([6, 5]), torch.tensor([3, 2]))

    def loss(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(
            x.log_softmax(-1), targets + 1, inputs, lengths, reduction=reduction,
            zero_infinity=True,
        )  # fmt: skip

    everywhere(loss, real(6, 2, 5), below(4, 2, 3))


def test_ctc_of_targets_in_one_row() -> None:
    def loss(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(
            x.log_softmax(-1), targets + 1, torch.tensor([6, 5]), torch.tensor([3, 2])
        )

    everywhere(loss, real(6, 2, 5), below(4, 5))


def test_ctc_of_one_series() -> None:
    def loss(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(x.log_softmax(-1), targets + 1, torch.tensor(6), torch.tensor(3))

    everywhere(loss, real(6, 5), below(4, 3))
