"""A small convolutional network whose tangent kernel is taken before it is trained."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from shardmap.jobs import Bounds


class Network(nn.Sequential):
    """Two convolutions and a linear layer for digits of 8x8 pixels, as PyTorch initialises them.

    Takes one image, or a batch.

    Args:
        width: Channels of the convolutions.
    """

    def __init__(self, *, width: Annotated[int, Bounds(least=1)] = 32):
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(-3),
            nn.Linear(16 * width, 10),
        )


def total(logits: Tensor) -> Tensor:
    """The sum of the logits.

    The inner products of its gradients are the pseudo-NTK (Mohamadi, Bae and Sutherland 2023).
    """
    return logits.sum()
