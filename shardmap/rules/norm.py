"""Batching rules for layer, RMS and group norm: samples are more rows, or a larger batch.

Gradients of weights are sums over each sample's rows.

Reason for rules of ours: `torch.func.vmap` decomposes the backward of `layer_norm`. Measured on one
CPU core with 32 samples of 128 rows of 256: 2.2 ms; the kernel for the input's gradient and a
product and a sum for the weights' take 0.5 (8 samples of 512 rows of 768: 12.8; 1.6). Where a
sample fills the cache, its own call of the kernel beats any batched form (0.6 ms against 1.7 for
these 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from shardmap._torch import aten, current_level
from shardmap.program.ir import Equation
from shardmap.rules.fold import fold, unfold
from shardmap.rules.lowering import Lowering, V, given_results
from shardmap.rules.registry import register

Tensor = torch.Tensor

CACHE_ELEMENTS = 2**16
"""Number of elements of a sample from which one call per sample is faster than sums over a batch of
products that has left the cache."""


def affine(b: Lowering, out: V, weight: V | None, bias: V | None, shape: Sequence[int]) -> V:
    """`out * weight + bias`, with both viewed with the sample shape `shape`."""
    if weight is not None:
        out = b.call(aten.mul.Tensor, out, b.view(weight, shape), shape=out.shape, dtype=out.dtype)
    if bias is not None:
        out = b.call(aten.add.Tensor, out, b.view(bias, shape), shape=out.shape, dtype=out.dtype)
    return out


def _mixed(x: V, *others: V | None) -> bool:
    """True if a weight or bias has another dtype than `x`.

    The kernel computes in the wider one, which two separate calls cannot.
    """
    return any(v is not None and v.dtype != x.dtype for v in others)


def any_mapped(*values: V | None) -> bool:
    """True if any of the given values differs by sample."""
    return any(v is not None and v.mapped for v in values)


# -- layers


@register("norm", aten.native_layer_norm.default)
def layer_norm(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batch `layer_norm` by rows; a mapped weight is applied afterwards."""
    x, normalized, weight, bias, eps = args
    shared = not any_mapped(weight, bias)
    if not shared and _mixed(x, weight, bias):
        return NotImplemented
    given = (weight, bias) if shared else (None, None)
    out, mean, rstd = b.calls_several(aten.native_layer_norm.default, 3, x, normalized, *given, eps)
    if shared:
        return out, mean, rstd
    out = V(out.index, out.mapped, x.shape, x.dtype)
    shape = (*(1,) * (x.ndim - len(normalized)), *normalized)
    return affine(b, out, weight, bias, shape), mean, rstd


@register("norm", aten._fused_rms_norm.default)
def rms_norm(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batch `rms_norm` by rows; a mapped weight is applied afterwards."""
    x, normalized, weight, eps = args
    shared = not any_mapped(weight)
    if not shared and _mixed(x, weight):
        return NotImplemented
    out, rstd = b.calls_several(
        aten._fused_rms_norm.default, 2, x, normalized, weight if shared else None, eps
    )
    if shared:
        return out, rstd
    out = V(out.index, out.mapped, x.shape, x.dtype)
    return affine(b, out, weight, None, (*(1,) * (x.ndim - len(normalized)), *normalized)), rstd


def rows_sum(scale: Tensor | None, rows: Tensor) -> Tensor:
    """The sum of each sample's rows, scaled or not: `[B, m], [B, m, k] -> [B, k]`.

    A product reads the rows once. Without a scale a sum is faster: [32, 32, 64] 7 us against 78.
    """
    if scale is None:
        return rows.sum(1)
    if rows.shape[1] == 1:
        return (rows * scale.unsqueeze(-1)).squeeze(1)
    return torch.bmm(scale.unsqueeze(1), rows).squeeze(1)


def layer_weights(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    normalized: Sequence[int],
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of each sample's weight and bias.

    `[B, *m, *normalized] -> [B, *normalized]`, those that `mask` selects.
    """
    size, k = grad.shape[0], len(normalized)
    width = math.prod(normalized)
    m = math.prod(grad.shape[1 : grad.dim() - k])
    rows = grad.reshape(size, m, width)
    found = []
    if mask[0]:
        centred = x.reshape(size, m, width) - mean.reshape(size, m, 1)
        # A fresh page costs more than the computation in it, so one temporary serves for both
        # where autograd does not need the first.
        plain = current_level() is None and not (centred.requires_grad or rows.requires_grad)
        centred = centred.mul_(rows) if plain else centred * rows
        found.append(rows_sum(rstd.reshape(size, m), centred).view(size, *normalized))
    if mask[1]:
        found.append(rows_sum(None, rows).reshape(size, *normalized))
    return tuple(found)


def statistics(
    x: Tensor, mean: Tensor, rstd: Tensor, normalized: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation as functions of `x`, for outer gradients.

    The kernel's results are constants to autograd.

    The epsilon that the forward added is recovered from its result.
    """
    over = tuple(range(-len(normalized), 0))
    variance = x.var(over, correction=0, keepdim=True)
    epsilon = (rstd.pow(-2) - variance).detach()
    return x.mean(over, keepdim=True), (variance + epsilon).rsqrt()


@register("norm", aten.native_layer_norm_backward.default)
def layer_norm_backward(
    b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Batch the backward: the input's gradient by the kernel.

    Those of weight and bias are sums over each sample's rows.
    """
    grad, x, normalized, mean, rstd, weight, bias, _ = args
    mask = given_results(eq)
    normalized = list(normalized)
    if _mixed(x, grad, mean, rstd, weight):
        return NotImplemented
    shape = (*(1,) * (x.ndim - len(normalized)), *normalized)
    outs: list[V] = []
    everything = [b.batch(v) for v in (grad, x, mean, rstd)]
    if mask[0]:
        scaled, given = everything[0], weight
        if weight is not None and weight.mapped:
            scaled, given = affine(b, scaled, weight, None, shape), None

        def input_backward(
            grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
        ) -> Tensor:
            mean, rstd = (
                mean.contiguous(),
                rstd.contiguous(),
            )  # the kernel reads others out of bounds, without an error
            return aten.native_layer_norm_backward(
                grad, x, normalized, mean, rstd, weight, None, [True, False, False]
            )[0]

        outs.append(
            b.call(input_backward, scaled, *everything[1:], given, shape=x.shape, dtype=x.dtype)
        )
    wanted = (bool(mask[1]), bool(mask[2]))
    if any(wanted):
        alone = b.device_type == "cpu" and x.numel >= CACHE_ELEMENTS
        tracked = b.grad

        def weights(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
            if tracked:
                mean, rstd = statistics(x, mean, rstd, normalized)
            if not alone or grad.shape[0] == 0:
                return layer_weights(grad, x, mean, rstd, normalized, wanted)
            ones = torch.ones((), dtype=x.dtype, device=x.device).expand(
                normalized
            )  # only its presence is read
            call = aten.native_layer_norm_backward.default
            rows = [
                call(
                    *(t[i] for t in (grad, x)),
                    normalized,
                    mean[i],
                    rstd[i],
                    ones,
                    ones,
                    [False, *wanted],
                )
                for i in range(grad.shape[0])
            ]
            return tuple(torch.stack([row[i] for row in rows]) for i in (1, 2) if wanted[i - 1])

        outs += b.calls_several(weights, sum(wanted), *everything)
    return tuple(outs)


@register("norm", aten._fused_rms_norm_backward.default)
def rms_norm_backward(
    b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Batch the backward as for `layer_norm`, without a mean."""
    grad, x, normalized, rstd, weight, _ = args
    mask = given_results(eq)
    normalized = list(normalized)
    if _mixed(x, grad, rstd, weight):
        return NotImplemented
    shape = (*(1,) * (x.ndim - len(normalized)), *normalized)
    outs: list[V] = []
    grad, x, rstd = (b.batch(v) for v in (grad, x, rstd))
    if mask[0]:
        scaled, given = grad, weight
        if weight is not None and weight.mapped:
            scaled, given = affine(b, grad, weight, None, shape), None
        outs.append(
            b.calls_several(
                aten._fused_rms_norm_backward.default,
                2,
                scaled,
                x,
                normalized,
                rstd,
                given,
                [True, False],
            )[0]
        )
    if mask[1]:

        def weights(grad: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
            return layer_weights(grad, x, torch.zeros_like(rstd), rstd, normalized, (True, False))[
                0
            ]

        outs.append(b.call(weights, grad, x, rstd))
    return tuple(outs)


# -- groups


@register("norm", aten.native_group_norm.default)
def group_norm(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batch `group_norm` as a larger batch; a mapped weight is applied afterwards."""
    x, weight, bias, n, channels, area, groups, eps = args
    shared = not any_mapped(weight, bias)
    if not shared and _mixed(x, weight, bias):
        return NotImplemented
    given = (weight, bias) if shared else (None, None)

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        return aten.native_group_norm(
            x.contiguous(), weight, bias, x.shape[0], channels, area, groups, eps
        )

    out, mean, rstd = b.calls_several(normalise, 3, fold(b, x) if x.mapped else x, *given)
    stats = eq.outs[1].spec
    if x.mapped:
        out, mean, rstd = (
            unfold(b, v, s) for v, s in ((out, x.shape), (mean, stats.shape), (rstd, stats.shape))
        )
    out = V(out.index, out.mapped, x.shape, x.dtype)
    if not shared:
        out = affine(b, out, weight, bias, (1, channels, *(1,) * (x.ndim - 2)))
    return out, mean, rstd


@register("norm", aten.native_group_norm_backward.default)
def group_norm_backward(
    b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Batch the backward: the input's gradient by the kernel on a larger batch.

    Those of weight and bias are computed from sums over each channel.
    """
    grad, x, mean, rstd, weight, n, channels, area, groups, _ = args
    mask = given_results(eq)
    if _mixed(x, grad, mean, rstd, weight):
        return NotImplemented
    outs: list[V] = []
    grad, x, mean, rstd = (b.batch(v) for v in (grad, x, mean, rstd))
    if mask[0]:
        scaled, given = grad, weight
        if weight is not None and weight.mapped:
            scaled, given = affine(b, grad, weight, None, (1, channels, *(1,) * (x.ndim - 2))), None

        def input_backward(
            grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
        ) -> Tensor:
            numbers = (x.shape[0], channels, area, groups, [True, False, False])
            dense = [
                t.contiguous() for t in (grad, x, mean, rstd)
            ]  # the kernel reads others out of bounds, without an error
            return aten.native_group_norm_backward(*dense, weight, *numbers)[0]

        folded = [fold(b, v) for v in (scaled, x, mean, rstd)]
        outs.append(
            unfold(b, b.call(input_backward, *folded, given, shape=x.shape, dtype=x.dtype), x.shape)
        )
    if mask[1]:

        def weight_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
            size = grad.shape[0]
            grad, x = (t.reshape(size, n, groups, channels // groups, area) for t in (grad, x))
            centred = x - mean.reshape(size, n, groups, 1, 1)
            return (
                ((grad * centred).sum(-1) * rstd.reshape(size, n, groups, 1))
                .sum(1)
                .view(size, channels)
            )

        outs.append(b.call(weight_backward, grad, x, mean, rstd, shape=(channels,), dtype=x.dtype))
    if mask[2]:
        over = [1, *range(3, x.ndim + 1)]
        outs.append(b.call(aten.sum.dim_IntList, grad, over, shape=(channels,), dtype=x.dtype))
    return tuple(outs)
