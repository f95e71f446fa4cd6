"""Convolutions: the map joins the batch if the weight is shared, the groups if it is not.

The gradient of a weight for each sample takes most time. Measured on one CPU core, milliseconds for
32 samples (grouped convolution / one call per sample / channels-last im2col in chunks and `bmm`):
16->32 channels 28x28 3x3 1.3 / 3.6 / 3.6; 64->64 14x14 3x3 2.9 / 8.3 / 6.3; 20->50 12x12 5x5 1.4 /
7.8 / 2.1; 1->20 28x28 5x5 0.6 / 1.5 / 0.8. So it is one grouped convolution, whose groups are the
samples. Two exceptions: 1x1 is a plain `bmm` (0.6 against 0.75), and for a few input channels under
a large kernel the grouped kernel falls back to a slow one: 3->32 32x32 5x5 9.8 / 2.3 / 4.2 and
3->64 56x56 7x7 (16 samples) 20 / 10 / 33, so there each sample has its call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.fold import fold, unfold
from shardmap.rules.lowering import Lowering, V, given_results
from shardmap.rules.registry import register

Tensor = torch.Tensor


class Options:
    """The options of a convolution, as its operators take them."""

    def __init__(
        self,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: bool,
        output_padding: Any,
        groups: int,
    ):
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.transposed, self.output_padding, self.groups = transposed, output_padding, groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, times: int) -> Tensor:
        """Convolve with `times` as many groups."""
        return aten.convolution(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups * times,
        )

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, times: int, mask: Sequence[bool]
    ) -> tuple[Any, ...]:
        """The gradients that `mask` selects, with `times` as many groups; no bias."""
        numbers = (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups * times,
        )
        return aten.convolution_backward(grad, x, weight, None, *numbers, [*mask, False])

    @property
    def pointwise(self) -> bool:
        """True if input and output positions are equal for a kernel of one element."""
        plain = (self.stride, 1), (self.padding, 0), (self.dilation, 1)
        return (
            not self.transposed
            and self.groups == 1
            and all(n == wanted for ns, wanted in plain for n in ns)
        )


def into_channels(t: Tensor) -> Tensor:
    """Move samples into channels: `[B, n, c, ...] -> [n, B*c, ...]`; no copy if `n = 1`."""
    return t.transpose(0, 1).flatten(1, 2)


def out_of_channels(t: Tensor, size: int, channels: int) -> Tensor:
    """Move samples out of channels: `[n, B*c, ...] -> [B, n, c, ...]`."""
    return t.view(t.shape[0], size, channels, *t.shape[2:]).transpose(0, 1)


def of_no_samples(shape: Sequence[int], x: Tensor, y: Tensor) -> Tensor:
    """The result of an empty batch, `[0, *shape]`: kernels refuse a call without groups.

    It is differentiable by both arguments.
    """
    return (x.sum() * y.sum()).expand(0, *shape)


def grouped(options: Options, x: Tensor, weight: Tensor, channels: int) -> Tensor:
    """Convolve each sample with its own weight.

    `[B, n, c, ...], [B, o, c/g, ...] -> [B, n, o, ...]`, with samples as groups.
    """
    size = x.shape[0]
    return out_of_channels(
        options.forward(into_channels(x), weight.flatten(0, 1), None, size), size, channels
    )


def shared_input(options: Options, x: Tensor, weight: Tensor, channels: int) -> Tensor:
    """Convolve one input with every sample's weight: the samples are further output channels."""
    size, groups = weight.shape[0], options.groups
    if options.transposed:  # [B, c, o/g, ...] -> [c, B*o/g, ...]
        merged = weight.transpose(0, 1).flatten(1, 2)
    else:  # [B, g*o/g, c/g, ...] -> [g*B*o/g, c/g, ...]
        merged = weight.unflatten(1, (groups, channels // groups)).transpose(0, 1).flatten(0, 2)
    out = options.forward(x, merged, None, 1)
    rest = out.shape[2:]
    out = out.view(out.shape[0], groups, size, channels // groups, *rest)
    return out.permute(2, 0, 1, 3, *range(4, out.dim())).reshape(
        size, out.shape[0], channels, *rest
    )


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


def weight_gradient(
    options: Options, shape: tuple[int, ...], per_sample_call: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a function of the mapped gradient and input.

    It returns the gradient of each sample's weight, `[B, *shape]`.
    """
    point = options.pointwise and math.prod(shape[2:]) == 1

    def matmul(grad: Tensor, x: Tensor) -> Tensor:
        grad, x = (t.squeeze(1).flatten(2) for t in (grad, x))
        return torch.bmm(grad, x.transpose(1, 2)).view(-1, *shape)

    def one_call(grad: Tensor, x: Tensor) -> Tensor:
        size = grad.shape[0]
        like = grad.new_zeros(()).expand(
            size * shape[0], *shape[1:]
        )  # its shape is read only, but an outer map refuses reads of `empty`
        _, out, _ = options.backward(
            into_channels(grad), into_channels(x), like, size, (False, True)
        )
        return out.view(size, *shape)

    def calls(grad: Tensor, x: Tensor) -> Tensor:
        like = grad.new_zeros(()).expand(shape)
        rows = zip(grad.unbind(0), x.unbind(0), strict=True)
        found = [options.backward(g, s, like, 1, (False, True))[1] for g, s in rows]
        return torch.stack(found) if found else grad.new_empty((0, *shape))

    def weight_backward(grad: Tensor, x: Tensor) -> Tensor:
        if not grad.shape[0]:
            return of_no_samples(shape, grad, x)
        if point and grad.shape[1] == 1:
            return matmul(grad, x)
        return calls(grad, x) if per_sample_call else one_call(grad, x)

    return weight_backward


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
            slow = (
                b.device_type == "cpu"
                and 1 < shape[1] < 8
                and math.prod(shape[2:]) >= 25
                and options.groups == 1
            )
            function = weight_gradient(options, shape, slow)
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
