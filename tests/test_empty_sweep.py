"""PyTorch's operator database over batches of no samples."""

from __future__ import annotations

import pytest
import torch

from tests import empty_sweep, sweep
from tests.test_sweep import PARTS, TODAY, part

MENDED = (
    "nn_functional_pixel_shuffle", "nn_functional_pixel_unshuffle", "fft_rfft", "stft",
    "block_diag", "combinations", "unique_consecutive", "linalg_lstsq",
)  # fmt: skip
"""Operators whose kernels, or rules, cannot take an empty batch."""


def assert_right(names: list[str]) -> None:
    """Assert that batches of no samples have the form of a sample's results, and gradients."""
    found = [text for name in names for text in empty_sweep.judge(name)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", MENDED)
def test_kernels_that_take_no_empty_batch(name: str) -> None:
    """They are not run."""
    assert_right([name])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("index", [pytest.param(TODAY, id=f"part_{TODAY}_of_{PARTS}")])
def test_part_of_the_day(index: int) -> None:
    """A sixteenth each day; the test's id says which."""
    assert_right(part(list(sweep.operators()), index))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("index", range(PARTS))
def test_all(index: int) -> None:
    """Every operator."""
    assert_right(part(list(sweep.operators()), index))


def test_the_sweep_notices_another_shape() -> None:
    """A function whose map has other results than a sample of zeros is complained about."""

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        sizes.append(len(sizes))
        return [x.new_zeros(len(sizes))]

    sizes: list[int] = []
    assert "output 0" in empty_sweep.complaint(function, [torch.ones(3)], [0])
