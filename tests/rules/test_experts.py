"""Products by groups, as mixture-of-experts layers call them, compared with the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rules.against_loop import Make, real
from tests.rules.everywhere import everywhere

HALF = torch.bfloat16


def ends(total: int, *shares: int) -> Make:
    """A maker of the ends of groups of some sizes, in any order."""

    def make(g: torch.Generator) -> torch.Tensor:
        sizes = torch.tensor(shares)[torch.randperm(len(shares), generator=g)]
        assert int(sizes.sum()) == total
        return sizes.cumsum(0).to(torch.int32)

    return make


GROUPS: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "rows": (
        lambda x, w, e: torch._grouped_mm(x, w, offs=e),
        [real(6, 8, dtype=HALF), real(3, 8, 16, dtype=HALF), ends(6, 2, 0, 4)],
    ),
    "columns": (
        lambda x, w, e: torch._grouped_mm(x, w, offs=e),
        [real(3, 8, 16, dtype=HALF), real(16, 16, dtype=HALF), ends(16, 8, 0, 8)],
    ),
    "sums": (
        lambda x, w, e: torch._grouped_mm(x.t().contiguous().t(), w, offs=e),
        [real(8, 6, dtype=HALF), real(6, 16, dtype=HALF), ends(6, 2, 0, 4)],
    ),
    "matrices": (
        lambda x, w: torch._grouped_mm(x, w),
        [real(3, 8, 16, dtype=HALF), real(3, 16, 8, dtype=HALF)],
    ),
    "single precision": (
        lambda x, w, e: torch._grouped_mm(x, w, offs=e),
        [
            real(6, 8, dtype=torch.float32),
            real(3, 8, 16, dtype=torch.float32),
            ends(6, 2, 0, 4),
        ],
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups(name: str) -> None:
    func, makers = GROUPS[name]
    tolerance = 1e-5 if name == "single precision" else 3e-2
    everywhere(func, *makers, tolerance=tolerance, strided=False)


def test_elements_behind_the_last_group_are_in_no_sum() -> None:
    def sums(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(
            x.t().contiguous().t(), w, offs=torch.tensor([2, 5], dtype=torch.int32)
        )

    makers = real(8, 6, dtype=torch.float32), real(6, 16, dtype=torch.float32)
    everywhere(sums, *makers, tolerance=1e-5, strided=False, gradient=False)
