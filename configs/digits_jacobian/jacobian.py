"""The Jacobian of a network's logits with respect to the pixels of one image."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def input_jacobian(model: nn.Module, image: Tensor) -> Tensor:
    """The Jacobian of one sample's logits with respect to its pixels.

    Args:
        model: Takes one image.
        image: [1, 8, 8].

    Returns:
        [10, 1, 8, 8]: how each logit changes with each pixel.
    """
    jacobian = torch.autograd.functional.jacobian(model, image)
    assert isinstance(jacobian, Tensor)  # one tensor in, one tensor out
    return jacobian
