"""Losses over classes: unreduced for all samples at once, then each sample's sum or mean.

Cross-entropy is part of nearly every per-sample gradient. `torch.func.vmap` decomposes `nll_loss`
into a dozen calls; here the kernel takes all samples' rows in one. The kernels check that each
target is a class.
"""

from __future__ import annotations

from typing import Any

import torch

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.fold import flat_rows
from shardmap.rules.lowering import Given, Lowering, Named, V
from shardmap.rules.registry import register

Tensor = torch.Tensor
NONE, MEAN = 0, 1


def rows(t: Tensor, trailing: int) -> Tensor:
    """Flatten all dimensions before the last `trailing` ones.

    `[B, n, *rest] -> [B*n, *rest]`; numbers become rows of one.
    """
    return t.flatten(0, t.dim() - trailing - 1) if t.dim() > trailing else t.unsqueeze(1)


def target_weights(x: Tensor, target: Tensor, weight: Tensor | None, ignored: int) -> Tensor:
    """The weight of each target, `[B, *target]`: 0 where it is ignored."""
    keep = target != ignored
    if weight is None:
        return keep.to(x.dtype)
    at = flat_rows(target.masked_fill(~keep, 0))
    wide = weight.expand(at.shape[0], -1) if weight.dim() == 1 else weight
    return wide.gather(1, at).view(target.shape).masked_fill(~keep, 0.0)


class Loss:
    """One of the two kernels: rows of classes, or images of them."""

    def __init__(self, space: int):
        self.space = space
        self.forward = aten.nll_loss2d_forward if space else aten.nll_loss_forward
        self.backward = aten.nll_loss2d_backward if space else aten.nll_loss_backward

    def elements(self, x: Tensor, target: Tensor, ignored: int) -> Tensor:
        """Compute the loss of each target without weights.

        `[B, *n, classes, *space], [B, *n, *space] -> [B, *n, *space]`.
        """
        got = self.forward(rows(x, 1 + self.space), rows(target, self.space), None, NONE, ignored)[
            0
        ]
        return got.view(target.shape)

    def gradient(self, grad: Tensor, x: Tensor, target: Tensor, ignored: int) -> Tensor:
        """Compute the gradient of `elements` by `x`."""
        flat, like = rows(x, 1 + self.space), grad.new_zeros(())
        got = self.backward(
            rows(grad, self.space), flat, rows(target, self.space), None, NONE, ignored, like
        )
        return got.view(x.shape)


ROWS, IMAGES = Loss(0), Loss(2)


def _forward(loss: Loss) -> Any:
    def rule(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
        x, target, weight, reduction, ignored = args

        def nll(x: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
            each, factors = (
                loss.elements(x, target, ignored),
                target_weights(x, target, weight, ignored),
            )
            if weight is not None:
                each = each * factors
            if reduction == NONE:
                return each, x.new_zeros(x.shape[0])
            total = flat_rows(factors).sum(1)
            out = flat_rows(each).sum(1)
            return (out / total if reduction == MEAN else out), total

        return b.calls_several(nll, 2, b.batch(x), b.batch(target), weight)

    return rule


def _backward(loss: Loss) -> Any:
    def rule(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
        grad, x, target, weight, reduction, ignored, total = args

        def nll(
            grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, total: Tensor
        ) -> Tensor:
            if reduction == MEAN:
                grad = grad / total
            if reduction != NONE:
                grad = grad.view(-1, *(1,) * (target.dim() - 1)).expand(target.shape)
            if weight is not None:
                grad = grad * target_weights(x, target, weight, ignored)
            return loss.gradient(grad.contiguous(), x, target, ignored)

        tensors = b.batch(grad), b.batch(x), b.batch(target), weight, b.batch(total)
        return b.call(nll, *tensors, shape=x.shape, dtype=x.dtype)

    return rule


register("nll", aten.nll_loss_forward.default)(_forward(ROWS))
register("nll", aten.nll_loss_backward.default)(_backward(ROWS))
register("nll", aten.nll_loss2d_forward.default)(_forward(IMAGES))
register("nll", aten.nll_loss2d_backward.default)(_backward(IMAGES))


# -- margins


def _reduced(each: Tensor, reduction: int, size: int, shape: tuple[int, ...]) -> Tensor:
    if reduction == NONE:
        return each.view(size, *shape)
    each = each.view(size, each.numel() // max(1, size))
    return each.mean(1) if reduction == MEAN else each.sum(1)


def _spread(grad: Tensor, reduction: int, size: int, count: int) -> Tensor:
    """Spread the cotangent of the reduced loss over rows, `[B*n]`."""
    if reduction == NONE:
        return grad.reshape(-1)
    grad = grad / count if reduction == MEAN else grad
    return grad.view(size, 1).expand(size, count).reshape(-1)


def _rows_of(x: V) -> int:
    return x.shape[0] if x.ndim == 2 else 1


def _own_weights(target: Tensor, weight: Tensor) -> Tensor:
    """The weight of each row's class: `[B, *n], [B, classes] -> [B * n]`."""
    return weight.gather(1, flat_rows(target)).flatten()


@register("nll", aten.multi_margin_loss.default)
def multi_margin(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch by rows of all samples, reduced by sample."""
    given: list[Any] = [*args, *(1, 1.0, None, MEAN)[len(args) - 2 :]]
    x, target, p, margin, weight, reduction = given
    if kwargs:
        return NotImplemented
    shape = eq.outs[0].spec.shape
    own = weight is not None and weight.mapped

    def forward(x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        shared = None if own else weight
        each = aten.multi_margin_loss(rows(x, 1), target.flatten(), p, margin, shared, NONE)
        if own and weight is not None:
            each = each * _own_weights(target, weight)
        return _reduced(each, reduction, x.shape[0], shape)

    return b.call(forward, b.batch(x), b.batch(target), weight, shape=shape, dtype=x.dtype)


@register("nll", aten.multi_margin_loss_backward.default)
def multi_margin_backward(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the backward by rows, each with its share of its sample's cotangent."""
    given: list[Any] = [*args, *(None, MEAN)[len(args) - 5 :]]
    grad, x, target, p, margin, weight, reduction = given
    if kwargs:
        return NotImplemented
    count, own = _rows_of(x), weight is not None and weight.mapped

    def backward(grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        spread = _spread(grad, reduction, x.shape[0], count)
        shared = None if own else weight
        if own and weight is not None:
            spread = spread * _own_weights(target, weight)
        return aten.multi_margin_loss_backward(
            spread, rows(x, 1), target.flatten(), p, margin, shared, NONE
        ).view(x.shape)

    return b.call(
        backward, b.batch(grad), b.batch(x), b.batch(target), weight, shape=x.shape, dtype=x.dtype
    )


@register("nll", aten.multilabel_margin_loss_forward.default)
def multilabel_margin(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch by rows of all samples, reduced by sample."""
    x, target, reduction = args
    shape = eq.outs[0].spec.shape

    def forward(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        each, marked = aten.multilabel_margin_loss_forward(rows(x, 1), rows(target, 1), NONE)
        return _reduced(each, reduction, x.shape[0], shape), marked.view(target.shape)

    return b.calls_several(forward, 2, b.batch(x), b.batch(target))


@register("nll", aten.multilabel_margin_loss_backward.default)
def multilabel_margin_backward(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the backward by rows, each with its share of its sample's cotangent."""
    grad, x, target, reduction, marked = args
    count = _rows_of(x)

    def backward(grad: Tensor, x: Tensor, target: Tensor, marked: Tensor) -> Tensor:
        spread = _spread(grad, reduction, x.shape[0], count)
        flat = (rows(t, 1) for t in (x, target, marked))
        x_rows, target_rows, marked_rows = flat
        return aten.multilabel_margin_loss_backward(
            spread, x_rows, target_rows, NONE, marked_rows
        ).view(x.shape)

    return b.call(
        backward, *(b.batch(v) for v in (grad, x, target, marked)), shape=x.shape, dtype=x.dtype
    )
