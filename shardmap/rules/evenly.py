"""Reductions of a whole sample to one of its elements, with the derivative of that form.

`x.max()`, `x.min()`, `x.median()` and `x.nanmedian()` without a dimension give each element that
equals the result the same part of a gradient. A batch reduces along a dimension, and torch's forms
for that differ: `median.dim` gives all to one of the equals, `amax` gives NaN where the result is
NaN, and to all elements where the gradient is infinite (the logarithm of a largest element that is
zero). So where a derivative may be taken from outside, the batch takes the formulas of the form
that the loop calls (`evenly_distribute_backward` and `evenly_read_jvp`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from shardmap._torch import aten, functorch


class _Picked(torch.autograd.Function):
    """One element of each row: `[B, n] -> [B]`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
        return pick(rows)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, object], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: Tensor) -> tuple[Tensor, None]:
        saved = list(ctx.saved_tensors)
        rows, found = saved
        found = found.unsqueeze(1)
        equal = (rows == found) | ((rows != rows) & (found != found))  # NaN differs from itself
        parts = (grads[0] / equal.sum(1)).unsqueeze(1)
        if rows.is_cuda or any(map(functorch.is_functorch_wrapped_tensor, (rows, *grads))):
            return equal * parts, None  # so that torch needs no value: of infinity NaN everywhere
        return torch.where(equal, parts, parts.new_zeros(())), None

    @staticmethod
    def jvp(ctx: BackwardCFunction, *tangents: Tensor) -> Tensor:
        saved = list(ctx.saved_tensors)
        rows, found = saved
        equal = rows == found.unsqueeze(1)  # a result that is NaN has a tangent of NaN
        return (equal * (tangents[0] / equal.sum(1, keepdim=True))).sum(1)


def _middle(rows: Tensor) -> Tensor:
    return aten.median.dim(rows, 1)[0]


def _middle_of_numbers(rows: Tensor) -> Tensor:
    return aten.nanmedian.dim(rows, 1)[0]


def _largest(rows: Tensor) -> Tensor:
    return aten.amax.default(rows, [1])


def _smallest(rows: Tensor) -> Tensor:
    return aten.amin.default(rows, [1])


_PICKS: dict[object, Callable[[Tensor], Tensor]] = {
    aten.max.default: _largest,
    aten.min.default: _smallest,
    aten.median.default: _middle,
    aten.nanmedian.default: _middle_of_numbers,
}


def picked(op: object) -> Callable[[Tensor], Tensor] | None:
    """The form on rows `[B, n] -> [B]` of an operator that picks one of a sample's elements.

    It has the operator's derivatives; None for other operators.
    """
    pick = _PICKS.get(op)
    if pick is None:
        return None

    def picked_evenly(rows: Tensor) -> Tensor:
        return _Picked.apply(rows, pick)

    return picked_evenly
