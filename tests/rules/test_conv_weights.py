"""Per-sample gradients of a convolution's weight from patches, against the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import shardmap
from shardmap.rules import conv_weights

CASES = {
    "1d": (lambda x, w: F.conv1d(x, w, padding=1, stride=2), (3, 7), (4, 3, 3)),
    "uneven": (
        lambda x, w: F.conv2d(x, w, padding=(2, 0), stride=(1, 2), dilation=(2, 1)),
        (3, 7, 6),
        (5, 3, 3, 2),
    ),
    "same": (lambda x, w: F.conv2d(x, w, padding="same"), (3, 5, 4), (2, 3, 4, 3)),
    "groups": (lambda x, w: F.conv2d(x, w, groups=2, padding=1), (6, 4, 5), (4, 3, 3, 3)),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=4), (4, 5, 5), (8, 1, 3, 3)),
    "point": (lambda x, w: F.conv2d(x, w), (9, 4, 5), (6, 9, 1, 1)),
    "point, strided": (lambda x, w: F.conv2d(x, w, stride=2), (9, 5, 5), (6, 9, 1, 1)),
    "3d": (lambda x, w: F.conv3d(x, w, padding=1, stride=2), (2, 4, 3, 5), (3, 2, 3, 2, 3)),
    "many positions": (lambda x, w: F.conv2d(x, w), (8, 19, 18), (4, 8, 3, 3)),
    "many positions of few channels": (lambda x, w: F.conv2d(x, w), (3, 19, 18), (4, 3, 3, 3)),
}


@pytest.mark.parametrize("chunk", ["auto", 2])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("elements", [1, 2000, conv_weights.BLOCK_ELEMENTS])
def test_against_the_loop(name, chunk, elements, monkeypatch):
    """Every sample's gradient, with patches of one sample, some or all at a time."""
    monkeypatch.setattr(conv_weights, "BLOCK_ELEMENTS", elements)
    func, image, kernel = CASES[name]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    batch = torch.randn(7, *image, generator=generator, dtype=torch.float64)

    def gradient(x):
        return torch.autograd.grad((func(x[None], weight) ** 3).sum(), weight)[0]

    found = shardmap.vmap(gradient, chunk_size=chunk)(batch)
    torch.testing.assert_close(found, torch.stack([gradient(x) for x in batch]))
    again = torch.stack([gradient(x) for x in batch[:3]])
    side_by_side = shardmap.vmap(lambda x: torch.stack([gradient(x), gradient(2 * x)], -1))
    torch.testing.assert_close(side_by_side(batch[:3])[..., 0], again)
