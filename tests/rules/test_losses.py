"""The elementwise losses against the loop.

Reductions over a sample only, forward and the recorded backward.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.rules.against_loop import check

LOSSES: dict[str, Any] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "soft_margin": F.soft_margin_loss,
    "bce": F.binary_cross_entropy,
    "bce_logits": F.binary_cross_entropy_with_logits,
    "kl_div": F.kl_div,
    "poisson": F.poisson_nll_loss,
}
SHAPES: list[tuple[int, ...]] = [(2, 3), (), (1,), (2, 1), (1, 3)]


def unit(*shape: int) -> Any:
    """A maker of numbers inside (0, 1)."""
    return lambda g: 0.1 + 0.8 * torch.rand(shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(("name", "reduction"), itertools.product(LOSSES, ["none", "mean", "sum"]))
def test_losses(name: str, reduction: str) -> None:
    """Values, outer gradients, and the gradient taken inside."""
    loss = LOSSES[name]
    for shape in SHAPES if name in ("bce", "mse") else SHAPES[:2]:
        check(
            lambda x, y: loss(x, y, reduction=reduction),
            unit(*shape),
            unit(*shape),
            sizes=(3,),
            strided=False,
            gradient=name != "soft_margin",  # its target has no gradient
        )

        def inner(x: torch.Tensor, y: torch.Tensor) -> Any:
            x = x.detach().requires_grad_()
            value = loss(x, y, reduction=reduction)
            return torch.autograd.grad((value * 1.5).sum(), x)[0]

        check(inner, unit(*shape), unit(*shape), gradient=False, sizes=(2, 1))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_weights(reduction: str) -> None:
    """Weights that samples share, and weights of each sample."""
    check(
        lambda x, y, w: F.binary_cross_entropy(x, y, w, reduction=reduction),
        unit(2, 3),
        unit(2, 3),
        unit(3),
        sizes=(2,),
        gradient=False,
    )
    check(
        lambda x, y, w: F.binary_cross_entropy_with_logits(
            x, y, pos_weight=w, weight=w + 1, reduction=reduction
        ),
        unit(2, 3),
        unit(2, 3),
        unit(3),
        sizes=(2,),
        gradient=False,
    )


def test_a_mapped_cotangent() -> None:
    """Rows of a Jacobian: only the cotangent differs."""
    x, y = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    def rows(g: torch.Tensor) -> torch.Tensor:
        z = x.clone().requires_grad_()
        return torch.autograd.grad(F.binary_cross_entropy(z, y, reduction="none"), z, g)[0]

    check(rows, unit(3), gradient=False)
