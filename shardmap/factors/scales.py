"""The numbers that terms are multiplied and divided by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shardmap._torch import aten
from shardmap.factors.find import Term
from shardmap.program.ir import Var
from shardmap.rules.lowering import V

if TYPE_CHECKING:
    from shardmap.factors.builder import FactorBuilder


def scale_of(builder: FactorBuilder, term: Term) -> Any:
    """The product of a term's scales.

    It is a value of one element for each sample, `[B]`, or for all, or None.
    """
    return combined(builder, term.scales, term.right.spec.dtype)


def combined(
    builder: FactorBuilder, scales: tuple[tuple[str, Any], ...], dtype: torch.dtype
) -> V | None:
    """The product of several scales; None for none."""
    total: V | None = None
    for how, by in scales:
        value = builder.number(by) if type(by) is Var else by
        if total is None:
            total = _first(builder, how, value, dtype)
        else:
            total = builder.b.call(
                aten.mul.Tensor if how == "mul" else aten.div.Tensor, total, value, shape=()
            )
    return total


def _first(builder: FactorBuilder, how: str, value: Any, dtype: torch.dtype) -> V:
    if type(value) is V:
        return value if how == "mul" else builder.b.call(aten.reciprocal.default, value, shape=())
    return builder.b.call(plain, value, how == "div", dtype, shape=(), dtype=dtype, mapped=False)


def plain(value: float, inverted: bool, dtype: torch.dtype) -> torch.Tensor:
    """A python number, or its reciprocal, as a tensor."""
    number = torch.tensor(value, dtype=dtype)
    return number.reciprocal() if inverted else number
