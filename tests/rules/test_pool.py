"""Rules for pooling, resizing and padding against the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import shardmap
from tests.rules.against_loop import check, real
from tests.rules.test_conv import gradients

LINE, IMAGE, VOLUME = (2, 3, 6), (2, 4, 6, 6), (1, 2, 4, 4, 4)
GENERATOR = torch.Generator().manual_seed(0)
SAMPLES = torch.rand(2, 4, 2, generator=GENERATOR, dtype=torch.float64)

CASES = {
    "max 1": (lambda x: F.max_pool1d(x, 2), LINE),
    "max 2": (lambda x: F.max_pool2d(x, 3, 2, padding=1), IMAGE),
    "max 3": (lambda x: F.max_pool3d(x, 2, dilation=2), VOLUME),
    "average 1": (lambda x: F.avg_pool1d(x, 2), LINE),
    "average 2": (lambda x: F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False), IMAGE),
    "average 3": (lambda x: F.avg_pool3d(x, 2), VOLUME),
    "adaptive average 1": (lambda x: F.adaptive_avg_pool1d(x, 4), LINE),
    "adaptive average 2": (lambda x: F.adaptive_avg_pool2d(x, (4, 5)), IMAGE),
    "adaptive average 3": (lambda x: F.adaptive_avg_pool3d(x, 3), VOLUME),
    "adaptive max 1": (lambda x: F.adaptive_max_pool1d(x, 4), LINE),
    "adaptive max 2": (lambda x: F.adaptive_max_pool2d(x, (4, 5)), IMAGE),
    "adaptive max 3": (lambda x: F.adaptive_max_pool3d(x, 3), VOLUME),
    "fractional": (
        lambda x: F.fractional_max_pool2d(x, 2, output_size=3, _random_samples=SAMPLES),
        IMAGE,
    ),
    "nearest 1": (lambda x: F.interpolate(x, scale_factor=2), LINE),
    "linear 1": (lambda x: F.interpolate(x, size=9, mode="linear"), LINE),
    "nearest 2": (lambda x: F.interpolate(x, size=(7, 8)), IMAGE),
    "exact 2": (lambda x: F.interpolate(x, size=(7, 8), mode="nearest-exact"), IMAGE),
    "bilinear 2": (
        lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear", align_corners=True),
        IMAGE,
    ),
    "bicubic 2": (lambda x: F.interpolate(x, size=(7, 8), mode="bicubic"), IMAGE),
    "smooth 2": (lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True), IMAGE),
    "trilinear 3": (lambda x: F.interpolate(x, size=3, mode="trilinear"), VOLUME),
    "reflect 1": (lambda x: F.pad(x, (1, 2), "reflect"), LINE),
    "reflect 2": (lambda x: F.pad(x, (1, 2, 0, 1), "reflect"), IMAGE),
    "reflect 3": (lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), "reflect"), VOLUME),
    "replicate 1": (lambda x: F.pad(x, (1, 2), "replicate"), LINE),
    "replicate 2": (lambda x: F.pad(x, (1, 2, 0, 1), "replicate"), IMAGE),
    "replicate 3": (lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), "replicate"), VOLUME),
    "shuffle": (lambda x: F.pixel_shuffle(x, 2), IMAGE),
    "unshuffle": (lambda x: F.pixel_unshuffle(x, 2), IMAGE),
    "channels": (lambda x: F.channel_shuffle(x, 2), IMAGE),
    "unfold": (lambda x: F.unfold(x, 3, padding=1), IMAGE),
    "fold": (lambda x: F.fold(x, (3, 3), 2), (2, 8, 4)),
}
UNBATCHED = (
    "max 1",
    "max 2",
    "max 3",
    "average 2",
    "adaptive average 2",
    "adaptive max 2",
    "reflect 2",
    "replicate 3",
    "fold",
)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name):
    """Samples with a batch dimension, and without one where the operator takes those."""
    func, shape = CASES[name]
    check(gradients(func), real(*shape), gradient=False, sizes=(3,))
    if name in UNBATCHED:
        check(gradients(func), real(*shape[1:]), gradient=False, sizes=(2,), strided=False)


@pytest.mark.parametrize(
    "name", ["max 2", "average 2", "bilinear 2", "adaptive average 2", "unfold"]
)
def test_outer_gradients(name):
    """The gradient taken outside."""
    func, shape = CASES[name]
    check(func, real(*shape), sizes=(2,), strided=False)


def test_channels_last():
    """Samples in channels-last layout."""

    def make(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64).to(
            memory_format=torch.channels_last
        )

    check(gradients(lambda x: F.max_pool2d(x, 2)), make, gradient=False)
    check(gradients(lambda x: F.interpolate(x, scale_factor=2)), make, gradient=False)


def test_indices():
    """The positions of maxima count within their sample."""
    check(lambda x: F.max_pool2d(x, 2, return_indices=True), real(2, 2, 4, 4))
    check(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), real(2, 2, 4, 4))


def test_grids():
    """Image and grid in each choice of mapped ones."""

    def sample(x, grid):
        return F.grid_sample(x, grid, align_corners=False)

    check(gradients(sample), real(1, 2, 4, 4), real(1, 3, 3, 2), gradient=False)
    check(gradients(sample), real(1, 2, 3, 3, 3), real(1, 2, 2, 2, 3), gradient=False, sizes=(2,))
    check(lambda t: F.affine_grid(t, [2, 1, 3, 4], align_corners=False), real(2, 2, 3))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"ceil_mode": True}])
def test_many_channels(options):
    """Channels last and back: ties and NaN are decided as in the sample, in values and indices."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(3, (5, 2, 9, 7, 6), generator=generator).float()
    images[1, 0, 2, 3, 3] = float("nan")

    def pooled(x):
        x = x.detach().requires_grad_()
        out, indices = F.max_pool2d(x, 3, return_indices=True, **options)
        (by_input,) = torch.autograd.grad((out.nan_to_num() * out.detach().nan_to_num()).sum(), x)
        return out.detach(), indices, by_input

    for batch in (images, images.to(memory_format=torch.preserve_format).transpose(3, 4)):
        found = shardmap.vmap(pooled)(batch)
        for got, rows in zip(found, zip(*map(pooled, batch), strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(rows), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 2, 8, 8), (3, 2, 8, 8)])
@pytest.mark.parametrize("drawn_per_sample", [False, True])
def test_fractional_pooling_with_given_draws(shape, drawn_per_sample):
    """Draws have a batch dimension though an image has none; equal values: the first is taken."""
    draws = real(shape[0] if len(shape) == 4 else 1, 2, 2)

    def pooled(x, u):
        return F.fractional_max_pool2d(
            x, 2, output_size=(3, 3), _random_samples=u.sigmoid(), return_indices=True
        )

    def by_input(x, u):
        return torch.func.grad(lambda x: (pooled(x, u)[0] * 2).square().sum())(x)

    def ties(generator):
        return torch.randint(2, shape, generator=generator).double()

    kept = {"always": (1,)} if drawn_per_sample else {"never": (1,)}
    for make in (real(*shape), ties):
        check(pooled, make, draws, gradient=False, **kept)
        check(by_input, make, draws, gradient=False, **kept)


def test_fractional_pooling_of_volumes():
    """The same for volumes."""

    def pooled(x, u):
        return F.fractional_max_pool3d(
            x, 2, output_size=(2, 3, 2), _random_samples=u.sigmoid(), return_indices=True
        )

    check(pooled, real(2, 5, 6, 5), real(1, 2, 3), gradient=False, sizes=(3,))
    check(pooled, real(1, 2, 5, 6, 5), real(1, 2, 3), gradient=False, sizes=(3,))
