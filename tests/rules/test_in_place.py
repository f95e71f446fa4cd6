"""Operators that write to their first argument, and operators on lists, compared with the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rules.against_loop import below, real
from tests.rules.everywhere import everywhere

SCALED = {"beta": 0.5, "alpha": 2.0}
WRITING: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "addmm_": (
        lambda c, x, y: c.clone().addmm_(x, y, **SCALED),
        [real(3, 5), real(3, 4), real(4, 5)],
    ),
    "addmv_": (lambda c, x, y: c.clone().addmv_(x, y, **SCALED), [real(3), real(3, 4), real(4)]),
    "addr_": (lambda c, x, y: c.clone().addr_(x, y, **SCALED), [real(3, 4), real(3), real(4)]),
    "addbmm_": (
        lambda c, x, y: c.clone().addbmm_(x, y, **SCALED),
        [real(3, 5), real(2, 3, 4), real(2, 4, 5)],
    ),
    "baddbmm_": (
        lambda c, x, y: c.clone().baddbmm_(x, y, **SCALED),
        [real(2, 3, 5), real(2, 3, 4), real(2, 4, 5)],
    ),
    "tril_": (lambda x: x.sin().tril_().mul(2).triu_(-1), [real(3, 3)]),
    "masked_scatter_": (
        lambda x, m, s: x.sin().masked_scatter_(m > 0, s),
        [real(4, 3), below(2, 4, 3), real(12)],
    ),
    "masked_scatter_ by a broadcast mask": (
        lambda x, m, s: x.sin().masked_scatter_(m > 0, s),
        [real(4, 3), below(2, 3), real(12)],
    ),
    "a view": (lambda c, x, y: _into_a_view(c, x, y), [real(4, 5), real(3, 4), real(4, 5)]),
    "foreach_add": (lambda x, y: tuple(torch._foreach_add([x, y], [y, x])), [real(3), real(3)]),
    "foreach_mul_": (lambda x, y: _scaled_in_place(x, y), [real(3), real(4, 2)]),
    "foreach_norm": (lambda x, y: tuple(torch._foreach_norm([x, y])), [real(3), real(4)]),
    "foreach_addcdiv": (
        lambda x, y: tuple(torch._foreach_addcdiv([x, y], [y, x], [x, y], 0.5)),
        [real(3), real(3)],
    ),
    "foreach_lerp": (
        lambda x, y: tuple(torch._foreach_lerp([x, y], [y, x], 0.3)),
        [real(3), real(3)],
    ),
}


def _into_a_view(c: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    whole = c.sin()
    whole[1:].addmm_(x, y, **SCALED)
    return whole


def _scaled_in_place(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    own = [x.clone(), y.clone()]
    torch._foreach_mul_(own, 2.0)
    return tuple(own)


@pytest.mark.parametrize("name", WRITING)
def test_writing(name: str) -> None:
    func, makers = WRITING[name]
    everywhere(func, *makers)


def test_integers() -> None:
    everywhere(
        lambda c, x, y: c.clone().addmm_(x, y, beta=2, alpha=3),
        below(9, 3, 5), below(9, 3, 4), below(9, 4, 5), gradient=False,
    )  # fmt: skip
