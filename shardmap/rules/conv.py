"""Convolutions: the map joins the batch if the weight is shared, the groups if it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.conv_parts import (
    Options,
    grouped,
    into_channels,
    of_no_samples,
    out_of_channels,
    shared_input,
)
from shardmap.rules.conv_weights import weight_gradient
from shardmap.rules.fold import fold, unfold
from shardmap.rules.lowering import Lowering, V, given_results
from shardmap.rules.registry import register

Tensor = torch.Tensor


@register("conv", aten.convolution.default)
def convolution(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batch a convolution.

    A shared weight gets a larger batch; a mapped one more groups, or more output channels of one
    input.
    """
    x, weight, bias, *numbers = args
    options, spec = Options(*numbers), eq.outs[0].spec
    channels = spec.shape[1]
    if not weight.mapped:
        whole = bias is None or not bias.mapped
        if x.mapped:
            out = b.call(
                aten.convolution.default,
                fold(b, x),
                weight,
                bias if whole else None,
                *numbers,
                shape=spec.shape,
                dtype=spec.dtype,
            )
            out = unfold(b, out, spec.shape)
        else:
            out = b.call(
                aten.convolution.default,
                x,
                weight,
                bias if whole else None,
                *numbers,
                shape=spec.shape,
                dtype=spec.dtype,
            )
        if whole:
            return out
    else:
        rule: Callable[..., Tensor] = grouped if x.mapped else shared_input

        def convolve(x: Tensor, weight: Tensor) -> Tensor:
            if not weight.shape[0]:
                return of_no_samples(spec.shape, x, weight)
            return rule(options, x, weight, channels)

        out = b.call(convolve, x, weight, shape=spec.shape, dtype=spec.dtype)
    if bias is None:
        return out
    bias = b.view(bias, (1, channels, *(1,) * (len(spec.shape) - 2)))
    return b.call(aten.add.Tensor, out, bias, shape=spec.shape, dtype=spec.dtype)


@register("conv", aten.convolution_backward.default)
def convolution_backward(
    b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Batch the backward as three separate gradients.

    The input's is folded into the batch, the weight's uses groups, the bias's is a sum.
    """
    grad, x, weight, _, *numbers, _ = args
    options, mask, outs = Options(*numbers), given_results(eq), []
    if mask[0]:
        outs.append(_input_gradient(b, options, grad, x, weight, numbers))
    if mask[1]:
        shape = weight.shape
        if grad.mapped or x.mapped:
            function = weight_gradient(b, options, shape, grad, x)
            outs.append(
                b.call(function, b.batch(grad), b.batch(x), shape=shape, dtype=weight.dtype)
            )
        else:

            def shared(grad: Tensor, x: Tensor) -> Tensor:
                return options.backward(
                    grad, x, grad.new_zeros(()).expand(shape), 1, (False, True)
                )[1]

            outs.append(b.call(shared, grad, x, shape=shape, dtype=weight.dtype))
        # A kernel for images returns an unneeded gradient of a row with one column too many.
        outs[-1] = b.view(outs[-1], eq.outs[1].spec.shape)
    if mask[2]:
        over = [d + int(grad.mapped) for d in range(grad.ndim) if d != 1]
        outs.append(
            b.call(aten.sum.dim_IntList, grad, over, shape=(grad.shape[1],), dtype=grad.dtype)
        )
    return tuple(outs)


def _input_gradient(
    b: Lowering, options: Options, grad: V, x: V, weight: V, numbers: Sequence[Any]
) -> V:
    shape, dtype = x.shape, x.dtype
    if weight.mapped:

        def input_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
            size = grad.shape[0]
            if not size:
                return of_no_samples(shape, grad, weight)
            found = options.backward(
                into_channels(grad), into_channels(x), weight.flatten(0, 1), size, (True, False)
            )
            return out_of_channels(found[0], size, shape[1])

        return b.call(input_backward, b.batch(grad), b.batch(x), weight, shape=shape, dtype=dtype)
    mask = [True, False, False]
    if not grad.mapped:  # the input's values do not matter

        def shared(grad: Tensor, weight: Tensor) -> Tensor:
            return options.backward(
                grad, grad.new_zeros(()).expand(shape), weight, 1, (True, False)
            )[0]

        return b.call(shared, grad, weight, shape=shape, dtype=dtype)
    found = b.calls_several(
        aten.convolution_backward.default,
        3,
        fold(b, grad),
        fold(b, x),
        weight,
        None,
        *numbers,
        mask,
    )
    return unfold(b, V(found[0].index, True, shape, dtype), shape)
