"""`trace="auto"` on arguments whose first and last rows hold the same values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import shardmap
from tests.call.runs import counting


@pytest.mark.parametrize("ends", ["alike", "all alike"])
def test_arguments_whose_first_and_last_rows_are_alike(ends: str) -> None:
    """Labels of a few classes, or masks of ones: they need no recording at each call."""

    def function(row: Tensor, label: Tensor, mask: Tensor) -> Tensor:
        return (row * mask).log_softmax(0).gather(0, label.reshape(1))

    mapped, runs = shardmap.vmap(function), []
    labels = torch.tensor([1, 0, 2, 1, 1]) if ends == "alike" else torch.ones(5).long()
    for k in range(16):
        rows, mask = torch.randn(5, 3), torch.ones(5, 3)
        if k == 11:  # rows that no recording has seen
            mask[2, 1], labels = 0.0, labels.roll(1)
        with counting(function) as calls:
            found = mapped(rows, labels, mask)
        runs.append(calls())
        wanted = [function(*r) for r in zip(rows, labels, mask, strict=True)]
        torch.testing.assert_close(found, torch.stack(wanted))
    assert runs[2] == runs[4] == runs[5] == runs[6] == runs[-1] == 0
    # The recording, another that looks for what is kept, the last row and one that differs in the
    # mask: a function that reads the mask where no operator shows it would be found by that.
    assert 1 <= runs[11] <= 4
