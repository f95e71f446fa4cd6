"""The gradient of a convolution's weight for each sample, which takes most of the time.

Measured on one CPU core with 4 samples, milliseconds (one grouped convolution whose groups are the
samples, and the copy of its result to where it belongs / one call per sample / patches and a
product for each sample): 32->32 channels 32x32 3x3 1.25 / 1.87 / 2.05; 64->64 16x16 3x3 1.44 /
2.27 / 1.45; 128->128 8x8 3x3 1.97 / 2.23 / 1.36; 256->256 4x4 3x3 20.5 / 5.4 / 1.6; 3->32 32x32
5x5 1.25 / 0.92 / 0.78; 1->16 28x28 3x3 0.25 / 0.18 / 0.09. So it is patches, except for many
positions of many channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from shardmap.rules import huge_pages as pages
from shardmap.rules.conv_parts import Options, into_channels, of_no_samples
from shardmap.rules.lowering import Lowering, V

Tensor = torch.Tensor

MANY_POSITIONS, MANY_CHANNELS = 256, 8
"""More output positions, and at least as many input channels: a grouped convolution is faster."""

BLOCK_ELEMENTS = 2**20
"""Elements of the patches that are laid out at a time: they stay in the cache."""


def weight_gradient(
    b: Lowering, options: Options, shape: tuple[int, ...], grad: V, x: V
) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a function of the mapped gradient and input.

    It returns the gradient of each sample's weight, `[B, *shape]`.
    """
    positions = math.prod(grad.shape[2:])
    kernel = math.prod(shape[2:])
    alone = x.shape[0] == 1 and grad.shape[0] == 1 and not options.transposed
    if (
        b.device_type == "cpu"
        and alone
        and not (b.grad or b.transformed)
        and x.dtype in (torch.float32, torch.float64)
        and shape[1] * options.groups == x.shape[1]
        and (kernel == 1 or positions <= MANY_POSITIONS or shape[1] < MANY_CHANNELS)
        and not (shape[1] == 1 and options.groups > 1)
    ):
        return PatchProducts(options, shape)
    slow = b.device_type == "cpu" and 1 < shape[1] < MANY_CHANNELS and kernel >= 25
    return _weight_backward(options, shape, slow and options.groups == 1)


class PatchProducts:
    """Function that multiplies each sample's gradient by the patches of its input.

    A patch is what the kernel sees at one output position.
    """

    def __init__(self, options: Options, shape: tuple[int, ...]):
        self.shape = shape
        self.groups = options.groups
        space = len(shape) - 2
        self.stride, padding, self.dilation = (
            tuple(n) * (space // len(n))
            for n in (options.stride, options.padding, options.dilation)
        )
        self.padding = [n for p in reversed(padding) for n in (p, p)]

    def __call__(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradients `[B, *shape]` of `grad` `[B, 1, o, ...]` and `x` `[B, 1, c, ...]`."""
        shape = (grad.shape[0], *self.shape)
        out = pages.empty(shape, x)
        return self.into(grad, x, x.new_empty(shape) if out is None else out)

    def into(self, grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """Compute the gradients into `out`."""
        size, dense = grad.shape[0], out if out.is_contiguous() else out.new_empty(out.shape)
        channels, *kernel = self.shape[1:]
        positions = grad.shape[3:]
        rows, columns = channels * math.prod(kernel), math.prod(positions)
        weights = dense.view(size * self.groups, self.shape[0] // self.groups, rows)
        grads = grad.reshape(size * self.groups, self.shape[0] // self.groups, columns)
        step = max(1, BLOCK_ELEMENTS // max(1, rows * self.groups * columns))
        step = step if type(size) is int else max(size, 1)  # a symbol while a call is traced
        for start in range(0, size, step):
            count = min(step, size - start)
            patches = self._patches(x[start : start + count, 0], kernel, positions)
            part = slice(start * self.groups, (start + count) * self.groups)
            torch.bmm(
                grads[part],
                patches.reshape(count * self.groups, rows, columns).transpose(1, 2),
                out=weights[part],
            )
        return out if dense is out else out.copy_(dense)

    def _patches(self, x: Tensor, kernel: Sequence[int], positions: Sequence[int]) -> Tensor:
        """The patches of `x` `[B, c, ...]` as a view of its padded form, `[B, c, *k, *positions]`.

        Kernel elements come before positions.
        """
        padded = torch.nn.functional.pad(x, self.padding) if any(self.padding) else x
        batch, channel, *space = padded.stride()
        within = [s * d for s, d in zip(space, self.dilation, strict=True)]
        across = [s * d for s, d in zip(space, self.stride, strict=True)]
        return padded.as_strided(
            (*padded.shape[:2], *kernel, *positions), (batch, channel, *within, *across)
        )


def _weight_backward(
    options: Options, shape: tuple[int, ...], per_sample_call: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of `weight_gradient` by the kernels of convolutions; it is differentiable."""
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
