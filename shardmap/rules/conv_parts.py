"""The pieces of which convolutions and their gradients are made, for one sample or many."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardmap._torch import aten

Tensor = torch.Tensor


class Options:
    """The options of a convolution, as its operators take them."""

    def __init__(
        self,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
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
    ) -> tuple[Tensor, ...]:
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
