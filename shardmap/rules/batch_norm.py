"""Batching rules for batch and instance norm: samples join the batch, or become channels.

With statistics that all samples share (eval mode) a sample is a part of a larger batch. With
statistics of its own, computed or kept, each sample's channels are channels of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.conv_parts import into_channels, out_of_channels
from shardmap.rules.lowering import Lowering, V, given_results
from shardmap.rules.norm import any_mapped
from shardmap.rules.registry import register

Tensor = torch.Tensor


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.flatten()


def _batch_norm(
    b: Lowering,
    eq: Equation,
    x: V,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    numbers: Sequence[float],
) -> Any:
    """Batch a normalisation; `numbers` are momentum and epsilon.

    With a sample's own statistics samples become channels, with shared ones they join the batch.
    """
    updated = training and mean is not None
    if training and mean is not None and not (mean.mapped and var.mapped):
        return NotImplemented  # statistics that all samples share cannot be written to
    stats, channels = [o.spec.shape for o in eq.outs[1:3]], x.shape[1]
    if not training and any(shape != (0,) for shape in stats):
        return NotImplemented
    shared = not training and x.mapped and not any_mapped(weight, bias, mean, var)
    if not shared:
        x = b.batch(x)
        weight, bias, mean, var = (
            None if v is None else b.batch(v) for v in (weight, bias, mean, var)
        )

    def normalise(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any) -> tuple[Tensor, ...]:
        size = x.shape[0]
        if shared:
            out = aten.native_batch_norm(x.flatten(0, 1), weight, bias, mean, var, False, *numbers)[
                0
            ]
            out = out.view(x.shape)
            return out, *(x.new_empty((size, 0)) for _ in stats)
        if not size:  # the kernel refuses a batch without channels
            return torch.empty_like(x), *(x.new_empty((0, *s)) for s in stats)
        found = aten.native_batch_norm(
            into_channels(x),
            _flat(weight),
            _flat(bias),
            _flat(mean),
            _flat(var),
            training,
            *numbers,
        )
        kept = (
            t.view(size, -1) if t.numel() else t.new_empty((size, *s))
            for t, s in zip(found[1:], stats, strict=True)
        )
        return out_of_channels(found[0], size, channels), *kept

    def normalise_(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor) -> Any:
        # The flat statistics may be copies of those that the function wrote to.
        flat = mean.flatten().clone(), var.flatten().clone()
        results = normalise(x, weight, bias, *flat)
        for t, now in zip((mean, var), flat, strict=True):
            t.copy_(now.view(t.shape))
        return results

    return b.calls_several(normalise_ if updated else normalise, 3, x, weight, bias, mean, var)


@register("norm", aten.native_batch_norm.default, aten._native_batch_norm_legit.default)
def batch_norm(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batch norm with shared statistics (eval mode) or the sample's own (instance norm)."""
    x, weight, bias, mean, var, training, *numbers = args
    return _batch_norm(b, eq, x, weight, bias, mean, var, training, numbers)


@register("norm", aten._native_batch_norm_legit_no_training.default)
def batch_norm_eval(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batch norm in eval mode."""
    x, weight, bias, mean, var, *numbers = args
    return _batch_norm(b, eq, x, weight, bias, mean, var, False, numbers)


@register("norm", aten._native_batch_norm_legit.no_stats)
def batch_norm_without_stats(
    b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Batch norm with the sample's own statistics."""
    x, weight, bias, training, *numbers = args
    return _batch_norm(b, eq, x, weight, bias, None, None, training, numbers)


@register("norm", aten.native_batch_norm_backward.default)
def batch_norm_backward(
    b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Batch the backward with samples as channels: sums over a channel are a sample's."""
    grad, x, weight, mean, var, save_mean, save_invstd, train, eps, _ = args
    mask = given_results(eq)
    channels = x.shape[1]
    tensors = [
        None if v is None else b.batch(v)
        for v in (grad, x, weight, mean, var, save_mean, save_invstd)
    ]

    def backward(grad: Tensor, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        size = grad.shape[0]
        if not size:
            none = x.new_empty(0, channels)
            return tuple(
                [g for g, m in zip((torch.empty_like(x), none, none), mask, strict=True) if m]
            )
        flat = [_flat(t) for t in rest]
        gx, gw, gb = aten.native_batch_norm_backward(
            into_channels(grad), into_channels(x), *flat, train, eps, list(mask)
        )
        found = []
        if mask[0]:
            found.append(out_of_channels(gx, size, channels))
        return tuple(
            found + [g.view(size, channels) for g, m in ((gw, mask[1]), (gb, mask[2])) if m]
        )

    return b.calls_several(backward, sum(map(bool, mask)), *tensors)
