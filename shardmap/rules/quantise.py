"""Batching rules for quantisation, real and fake: rounding to a grid of a scale and a zero point.

With a grid of its own each sample becomes a channel of the kernel by channels; samples that share
one grid are one larger tensor. `torch.func.vmap` loops over the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.lowering import Given, Lowering, Named, V, arguments
from shardmap.rules.registry import register


@register("quantise", aten.fake_quantize_per_tensor_affine_cachemask.default)
def per_tensor(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the rounding to a grid of two numbers, and its mask."""
    return b.calls_several(eq.op, 2, *args, **kwargs)


@register("quantise", aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default)
def per_tensor_of_tensors(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the rounding to a grid of two tensors of one element, and its mask."""
    x, scale, zero, enabled, low, high = args
    if not (scale.mapped or zero.mapped or enabled.mapped):
        return b.calls_several(eq.op, 2, *args, **kwargs)

    def rows(x: Tensor, scale: Tensor, zero: Tensor, enabled: Tensor) -> tuple[Tensor, Tensor]:
        found, mask = by_channels(x.unsqueeze(1), scale.view(-1, 1), zero.view(-1, 1), 0, low, high)
        found, mask = found.view(x.shape), mask.view(x.shape)
        on = (enabled != 0).view(-1, *(1,) * (x.dim() - 1))
        return torch.where(on, found, x), torch.where(on, mask, True)

    return b.calls_several(rows, 2, *[b.batch(v) for v in (x, scale, zero, enabled)])


def by_channels(
    x: Tensor, scale: Tensor, zero: Tensor, axis: int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Round `[B, ...]` to grids `[B, channels]`, with the channels at dimension `axis` + 1."""
    if not x.numel():
        return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    moved = x.movedim(axis + 1, 1)
    channels = moved.reshape(moved.shape[0] * moved.shape[1], -1)
    found = aten.fake_quantize_per_channel_affine_cachemask(
        channels, scale.reshape(-1), zero.reshape(-1), 0, low, high
    )
    first, second = (t.view(moved.shape).movedim(1, axis + 1).contiguous() for t in found)
    return first, second


@register("quantise", aten.fake_quantize_per_channel_affine_cachemask.default)
def per_channel(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the rounding to a grid for each channel, and its mask."""
    a = arguments(eq, args, kwargs)
    x, scale, zero, axis = a["self"], a["scale"], a["zero_point"], a["axis"] % a["self"].ndim
    low, high = a["quant_min"], a["quant_max"]
    if not (scale.mapped or zero.mapped):
        return b.calls_several(eq.op, 2, x, scale, zero, axis + 1, low, high)

    def rows(x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        return by_channels(x, scale, zero, axis, low, high)

    return b.calls_several(rows, 2, *[b.batch(v) for v in (x, scale, zero)])


@register("quantise", aten.quantize_per_channel.default)
def to_integers_per_channel(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the quantisation by channels whose grids all samples share."""
    a = arguments(eq, args, kwargs)
    if a["scales"].mapped or a["zero_points"].mapped:
        return NotImplemented
    axis, spec = a["axis"] % a["self"].ndim + 1, eq.outs[0].spec
    grid = a["scales"], a["zero_points"], axis, a["dtype"]
    return b.call(eq.op, a["self"], *grid, shape=spec.shape, dtype=spec.dtype)


@register("quantise", aten.quantize_per_tensor.default, aten.dequantize.self, aten.int_repr.default)
def element_by_element(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> V:
    """Batch the quantisation to a grid of two numbers, and what leads back from integers."""
    spec = eq.outs[0].spec
    return b.call(eq.op, *args, shape=spec.shape, dtype=spec.dtype, **kwargs)


# -- grids that are learned


def _over_channels(op: Any, lead: int) -> Callable[..., Any]:
    """Make a function of `[B, ...]` that calls `op` with the channels of all samples in front.

    Args:
        op: The operator by channels.
        lead: Number of its first operands that have the channels among their dimensions; the next
            two are the scales and zero points.
    """

    def rows(axis: int, tail: tuple[Any, ...], *tensors: Tensor) -> Any:
        moved = [t.movedim(axis + 1, 1) for t in tensors[:lead]]
        shape = moved[0].shape
        flat = [t.reshape(shape[0] * shape[1], *shape[2:]).contiguous() for t in moved]
        grids = [t.reshape(-1).contiguous() for t in tensors[lead:]]
        found = op(*flat, *grids, 0, *tail)
        several = found if isinstance(found, tuple) else (found,)
        out = [several[0].view(shape).movedim(1, axis + 1).contiguous()]
        out += [t.view(shape[0], -1) for t in several[1:]]
        return tuple(out)

    return rows


def _learned(eq: Equation, args: Any, kwargs: Any, channels: bool) -> tuple[int, tuple[Any, ...]]:
    a = arguments(eq, args, kwargs)
    tail = a["quant_min"], a["quant_max"], a["grad_factor"]
    return (a["axis"] % a["self"].ndim if channels else 0), tail


@register("quantise", aten._fake_quantize_learnable_per_channel_affine.default)
def learned_per_channel(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> V:
    """Batch the rounding to learned grids, one for each channel."""
    axis, tail = _learned(eq, args, kwargs, True)
    rows = _over_channels(aten._fake_quantize_learnable_per_channel_affine.default, 1)

    def rounded(*tensors: Tensor) -> Tensor:
        return rows(axis, tail, *tensors)[0] if tensors[0].numel() else tensors[0].clone()

    spec = eq.outs[0].spec
    given = [b.batch(v) for v in args[:3]]
    return b.call(rounded, *given, shape=spec.shape, dtype=spec.dtype)


@register("quantise", aten._fake_quantize_learnable_per_tensor_affine.default)
def learned_per_tensor(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> V:
    """Batch the rounding to a learned grid: samples are channels."""
    _, tail = _learned(eq, args, kwargs, False)
    rows = _over_channels(aten._fake_quantize_learnable_per_channel_affine.default, 1)

    def rounded(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if not x.numel():
            return x.clone()
        return rows(0, tail, x.unsqueeze(1), scale, zero)[0].view(x.shape)

    spec = eq.outs[0].spec
    given = [b.batch(v) for v in args[:3]]
    return b.call(rounded, *given, shape=spec.shape, dtype=spec.dtype)


@register("quantise", aten._fake_quantize_learnable_per_channel_affine_backward.default)
def learned_per_channel_backward(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the gradients by the input, the scales and the zero points."""
    axis, tail = _learned(eq, args, kwargs, True)
    rows = _over_channels(aten._fake_quantize_learnable_per_channel_affine_backward.default, 2)

    def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return rows(axis, tail, *tensors)

    return b.calls_several(backward, 3, *[b.batch(v) for v in args[:4]])


@register("quantise", aten._fake_quantize_learnable_per_tensor_affine_backward.default)
def learned_per_tensor_backward(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the gradients by the input, the scale and the zero point: samples are channels."""
    _, tail = _learned(eq, args, kwargs, False)
    rows = _over_channels(aten._fake_quantize_learnable_per_channel_affine_backward.default, 2)
    shapes = [o.spec.shape for o in eq.outs]

    def backward(grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
        found = rows(0, tail, grad.unsqueeze(1), x.unsqueeze(1), scale, zero)
        return tuple([t.reshape(x.shape[0], *s) for t, s in zip(found, shapes, strict=True)])

    return b.calls_several(backward, 3, *[b.batch(v) for v in args[:4]])
