"""Weight normalisation, `v * (g / |v|)`, by plain operators, as its kernel supports no batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.lowering import Lowering
from shardmap.rules.registry import register

Tensor = torch.Tensor


def _norm_over(v: Tensor, kept: int) -> Tensor:
    """The norm of `[B, *shape]` over all dimensions except the map and `kept`, which stay."""
    over = [d for d in range(1, v.dim()) if d != kept]
    return torch.linalg.vector_norm(v, 2, over, keepdim=True)


def _kept(args: Sequence[Any], position: int, ndim: int) -> int:
    d = args[position] if len(args) > position else 0
    return d % ndim + 1


@register("norm", aten._weight_norm_interface.default)
def weight_norm(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batch `v * (g / |v|)` by plain operators, as the kernel supports no batches."""
    v, g = args[:2]
    kept = _kept(args, 2, v.ndim) if "dim" not in kwargs else kwargs["dim"] % v.ndim + 1
    if g.dtype != v.dtype or eq.outs[1].spec.dtype != v.dtype:
        return NotImplemented

    def normalise(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        norms = _norm_over(v, kept)
        return v * (g / norms), norms

    return b.calls_several(normalise, 2, b.batch(v), b.batch(g))


@register("norm", aten._weight_norm_interface_backward.default)
def weight_norm_backward(
    b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Batch the derivative of `v * (g / |v|)`."""
    grad, v, g, norms, d = args
    kept = d % v.ndim + 1
    if any(t.dtype != v.dtype for t in (grad, g, norms)):
        return NotImplemented

    def backward(grad: Tensor, v: Tensor, g: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        over = [i for i in range(1, v.dim()) if i != kept]
        along = (grad * v).sum(over, keepdim=True) if over else grad * v
        return (g / norms) * (grad - v * (along / (norms * norms))), along / norms

    return b.calls_several(backward, 2, *(b.batch(t) for t in (grad, v, g, norms)))
