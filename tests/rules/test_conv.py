"""Convolution rules against the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import shardmap
from tests.rules.against_loop import check, real


def gradients(func):
    """The value of `func` and its gradients by every argument, taken inside."""

    def with_gradients(*args):
        args = [a.detach().requires_grad_() for a in args]
        out = func(*args)
        return (out.detach(), *torch.autograd.grad((out**3).sum(), args))

    return with_gradients


CASES = {
    "1d": (lambda x, w: F.conv1d(x, w, padding=1, stride=2), real(1, 2, 7), real(4, 2, 3)),
    "2d unbatched": (lambda x, w: F.conv2d(x, w, padding=(1, 0)), real(2, 5, 6), real(3, 2, 3, 2)),
    "2d several": (lambda x, w: F.conv2d(x, w, dilation=2), real(2, 2, 6, 5), real(3, 2, 2, 2)),
    "2d groups": (lambda x, w: F.conv2d(x, w, groups=2), real(2, 4, 4, 4), real(6, 2, 2, 2)),
    "2d depthwise": (
        lambda x, w: F.conv2d(x, w, groups=3, padding=1),
        real(1, 3, 4, 4),
        real(3, 1, 3, 3),
    ),
    "2d 1x1": (F.conv2d, real(1, 3, 4, 4), real(2, 3, 1, 1)),
    "2d 5x5": (lambda x, w: F.conv2d(x, w, padding=2), real(1, 3, 6, 6), real(4, 3, 5, 5)),
    "3d": (F.conv3d, real(1, 2, 3, 4, 3), real(2, 2, 2, 2, 2)),
    "transposed 1d": (
        lambda x, w: F.conv_transpose1d(x, w, stride=2, output_padding=1),
        real(1, 2, 4),
        real(2, 3, 3),
    ),
    "transposed 2d": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1),
        real(2, 2, 3, 4),
        real(2, 3, 3, 3),
    ),
    "transposed groups": (
        lambda x, w: F.conv_transpose2d(x, w, groups=2),
        real(1, 4, 3, 3),
        real(4, 3, 2, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name):
    """Each choice of mapped input and weight."""
    func, *makers = CASES[name]
    check(gradients(func), *makers, gradient=False)


@pytest.mark.parametrize("transposed", [False, True])
def test_bias_and_outer_gradients(transposed):
    """A bias, shared or not, with the gradient taken outside."""
    conv = F.conv_transpose2d if transposed else F.conv2d
    check(lambda x, w, c: conv(x, w, c), real(2, 2, 4, 4), real(2, 2, 3, 3), real(2))
    check(
        gradients(lambda x, w, c: conv(x, w, c)),
        real(1, 2, 4, 4),
        real(2, 2, 3, 3),
        real(2),
        gradient=False,
        strided=False,
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_twice(groups):
    """Gradients of gradients."""

    def twice(x, w):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        gx, gw = torch.autograd.grad(
            (F.conv2d(x, w, groups=groups) ** 3).sum(), (x, w), create_graph=True
        )
        return torch.autograd.grad((gx**2).sum() + (gw**2).sum(), (x, w))

    check(twice, real(2, 2, 4, 3), real(4, 2 // groups, 2, 2), gradient=False)


def test_linear_in_the_weight_alone():
    """The gradient by the input where only the input is mapped does not differ by sample."""

    def by_input(x, w):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.conv2d(x, w).sum(), x)[0]

    check(by_input, real(1, 2, 4, 4), real(3, 2, 2, 2), gradient=False)


def test_a_shared_cotangent():
    """Gradients that need the shape of a mapped value alone do not differ by sample."""
    cotangent = torch.randn(
        1, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def both(x, w):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        return torch.autograd.grad(F.conv2d(x, w), (x, w), cotangent)

    check(both, real(1, 2, 4, 4), real(3, 2, 2, 2), gradient=False)


def test_channels_last():
    """Samples in channels-last layout."""
    check(
        gradients(F.conv2d),
        lambda g: torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64).to(
            memory_format=torch.channels_last
        ),
        real(2, 3, 3, 3),
        gradient=False,
    )


def test_single_precision():
    """The kernels that single precision takes."""
    check(
        gradients(lambda x, w: F.conv2d(x, w, padding=1)),
        real(1, 3, 8, 8, dtype=torch.float32),
        real(8, 3, 3, 3, dtype=torch.float32),
        gradient=False,
        tolerance=1e-4,
    )


@pytest.mark.parametrize("name", ["2d several", "2d groups", "2d 5x5"])
def test_inside_another_map(name):
    """A map over weights of a map over inputs."""
    func, *makers = CASES[name]
    once = gradients(func)
    generator = torch.Generator().manual_seed(0)
    x, weight = (make(generator) for make in makers)
    xs = torch.randn(3, 2, *x.shape, dtype=x.dtype, generator=generator)
    weights = torch.randn(3, *weight.shape, dtype=x.dtype, generator=generator)
    inner = shardmap.vmap(once, in_dims=(0, None))
    found = shardmap.vmap(inner)(xs, weights)
    expected = [[once(x, w) for x in row] for row, w in zip(xs, weights, strict=True)]
    for place, output in enumerate(found):
        torch.testing.assert_close(
            output, torch.stack([torch.stack([each[place] for each in row]) for row in expected])
        )
