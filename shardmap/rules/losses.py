"""Rules of the elementwise losses.

There is a loss for each element, reduced over the sample and never over the batch.
"""

from __future__ import annotations

import torch

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.lowering import Given, Lowering, Named, V, arguments
from shardmap.rules.promote import aligned, expanded
from shardmap.rules.registry import overloads, register

NONE, MEAN, SUM = 0, 1, 2
"""The values of `reduction`, as in ATen's Reduction.h."""

_FORWARD = """
    mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy
    binary_cross_entropy_with_logits
"""
_BACKWARD = """
    mse_loss_backward smooth_l1_loss_backward huber_loss_backward soft_margin_loss_backward
    binary_cross_entropy_backward
"""


@register("losses", *overloads(*_FORWARD.split()))
def loss(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> V:
    """Compute the loss of each element, then reduce over a sample's dimensions."""
    named = arguments(eq, args, kwargs)
    tensors = [v for v in named.values() if type(v) is V]
    shape = torch.broadcast_shapes(*(v.shape for v in tensors))
    reduction = named["reduction"]
    # The kernel of binary_cross_entropy squeezes its operands before it broadcasts them, so that a
    # batch of one-element
    # samples would meet a dimension of the other operand: all operands get the full shape.
    full = {k: expanded(b, v, shape) if type(v) is V else v for k, v in named.items()}
    each = b.call(eq.op, named=full | {"reduction": NONE}, shape=shape)
    if reduction == NONE or not shape:
        return each
    dims = list(range(1, len(shape) + 1))
    return b.call(aten.mean.dim if reduction == MEAN else aten.sum.dim_IntList, each, dims)


@register("losses", *overloads(*_BACKWARD.split()))
def loss_backward(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Compute the gradient of each element.

    A mean divides by the elements of a sample, so it is computed as a sum with a smaller cotangent.
    """
    named = arguments(eq, args, kwargs)
    x, target, grad = named["self"], named["target"], named["grad_output"]
    if x.shape != target.shape:
        return NotImplemented
    if named["reduction"] == MEAN:
        if not x.numel:
            return NotImplemented
        grad = b.call(aten.div.Scalar, grad, x.numel, shape=grad.shape)
        named["reduction"] = SUM
    full = {k: expanded(b, v, x.shape) if type(v) is V else v for k, v in named.items()}
    # Only this kernel does not broadcast the cotangent: it squeezes it first.
    squeezes = eq.op is aten.binary_cross_entropy_backward.default
    full["grad_output"] = expanded(b, grad, x.shape) if squeezes else aligned(b, grad, x.ndim)
    return b.call(eq.op, named=full)
