"""A digit classifier with differential privacy: descent along clipped, noised sums (DP-SGD).

Each step sums the per-sample gradients over all of the training data, each clipped to a norm of 1,
adds Gaussian noise of `--noise` times that norm, and steps along the result (Abadi et al. 2016).
Whether a sample was there moves the sum by at most 1, so the whole training is a Gaussian
mechanism: T steps with noise s are exactly as private as one look at a number that a sample moves
by mu = sqrt(T) / s standard deviations (Gaussian differential privacy, Dong, Roth and Su 2022,
corollaries 1 and 2), and for a given delta

    delta = Phi(-epsilon / mu + mu / 2) - exp(epsilon) Phi(-epsilon / mu - mu / 2).

Data: scikit-learn's 1,797 handwritten digits; the last fifth is for testing. The sums come without
the gradients ever being in memory.

    python examples/dp_sgd.py
    python examples/dp_sgd.py --noise 40     # more private, and worse
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import shardmap

# The accountant belongs to the run configs/dp_sgd_sums.
sys.path.append(str(Path(__file__).resolve().parents[1] / "configs" / "dp_sgd_sums"))
from private import epsilon  # noqa: E402


def load() -> tuple[Tensor, Tensor]:
    """Pixels, 0 to 1, [1797, 64], and labels, [1797], in random order."""
    bunch: Any = load_digits()
    order = torch.randperm(len(bunch.target))
    return torch.tensor(bunch.data, dtype=torch.float32)[order] / 16, torch.tensor(bunch.target)[
        order
    ]


def network() -> nn.Module:
    """A network of 4,810 parameters.

    Its activation is tanh: bounded activations keep gradients short, so that clipping changes them
    less.
    """
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def train(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, noise: float, rate: float
) -> None:
    """Descend along clipped, noised sums; the noise comes from torch's generator, as seeded."""
    reduction = shardmap.reduce.clipped_sum(max_norm=1.0, noise_multiplier=noise)
    sums = shardmap.per_sample_grad(model, F.cross_entropy, reduce=reduction)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        total = sums(images, labels)
        for name, parameter in model.named_parameters():
            parameter.grad = total[name] / len(images)
        optimizer.step()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that are read right."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def main() -> None:
    """Train with and without privacy, and say what it costs and what it buys."""
    parser = argparse.ArgumentParser(description="Differentially private training on digits.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--noise",
        type=float,
        default=20.0,
        help="standard deviation, in units of the clipping norm",
    )
    parser.add_argument("--rate", type=float, default=0.25)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images, labels = load()
    taught = len(images) * 4 // 5
    test = images[taught:], labels[taught:]
    for noise in (0.0, options.noise):
        torch.manual_seed(options.seed)
        model = network()
        train(model, images[:taught], labels[:taught], options.steps, noise, options.rate)
        spent = (
            f"epsilon {epsilon(options.steps, noise, options.delta):.2f} at delta {options.delta:g}"
            if noise
            else "no privacy"
        )
        share = accuracy(model, *test)
        print(
            f"{options.steps} clipped sums over {taught:,} digits, noise {noise:g}: {share:.1%} of "
            f"new digits right, {spent}"
        )


if __name__ == "__main__":
    main()
