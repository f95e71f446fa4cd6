"""The privacy budget that clipped, noised sums of gradients spend."""

from __future__ import annotations

import math

import torch


def epsilon(steps: int, noise: float, delta: float) -> float:
    """The epsilon that `steps` noised sums over all samples spend at `delta`.

    A sum to which each sample adds at most 1, with Gaussian noise of standard deviation `noise`, is
    1/noise-GDP; `steps` of them are exactly as private as one with mu = sqrt(steps) / noise
    (Gaussian differential privacy: Dong, Roth and Su 2022, corollaries 1 and 2):

        delta = Phi(-epsilon / mu + mu / 2) - exp(epsilon) Phi(-epsilon / mu - mu / 2)

    Args:
        steps: How many sums are released, each over all samples: there is no amplification by
            subsampling in this.
        noise: Standard deviation, in units of the clipping norm.
        delta: With which probability the bound may fail, above 0 and below 1.

    Returns:
        The epsilon, for neighbours that differ by one sample being there or not.
    """
    mu = math.sqrt(steps) / noise

    def spent(epsilon: float) -> float:
        """The delta that goes with an epsilon; it falls as epsilon grows."""
        tails = torch.special.log_ndtr(
            torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64)
        )
        return math.exp(float(tails[0])) - math.exp(epsilon + float(tails[1]))

    if spent(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while spent(high) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high
