"""Kernel regression with the empirical neural tangent kernel of an untrained CNN.

A wide network that is trained by gradient descent behaves like kernel regression with the inner
products of its per-sample gradients (Jacot, Gabriel and Hongler 2018). The kernel is known before
any training: K[i, j] is the inner product of the gradients, with respect to all weights, of the sum
of the ten logits for image i and for image j (the pseudo-NTK of Mohamadi, Bae and Sutherland 2023).
One call gives it, [N, N], without the gradients, [N, parameters], ever being in memory. Ridge
regression with it reads scikit-learn's handwritten digits from few labels; beside it the same with
the plain pixels, and the network, trained.

    python examples/ntk_regression.py
    python examples/ntk_regression.py --labels 50 --width 16
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import shardmap


def load(samples: int) -> tuple[Tensor, Tensor]:
    """Images with mean 0, [N, 1, 8, 8], and labels, [N], in random order."""
    bunch: Any = load_digits()
    order = torch.randperm(len(bunch.target))[:samples]
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    return images - images.mean(), torch.tensor(bunch.target)[order]


def network(width: int) -> nn.Module:
    """Two convolutions and a linear layer, as PyTorch initialises them.

    Takes one image, or a batch.
    """
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(-3),
        nn.Linear(16 * width, 10),
    )  # fmt: skip


def tangent_kernel(model: nn.Module, images: Tensor) -> Tensor:
    """Inner products of the gradients of the sums of logits, [N, N], the mean of the diagonal 1."""
    gram = shardmap.per_sample_grad(model, torch.sum, reduce=shardmap.reduce.gram())(images)
    return gram / gram.diagonal().mean()


def regression(kernel: Tensor, labels: Tensor, taught: int) -> float:
    """Learn the first `taught` labels by kernel ridge regression; return the others' accuracy.

    The ridge is the one with the smallest leave-one-out error, which has a closed form (Wahba
    1990).
    """
    targets = F.one_hot(labels[:taught], 10).double() - 0.1
    known, new = kernel[:taught, :taught].double(), kernel[taught:, :taught].double()
    tried = []
    for ridge in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        inverse = torch.linalg.inv(known + ridge * torch.eye(taught, dtype=torch.float64))
        weights = inverse @ targets
        missed = weights / inverse.diagonal().unsqueeze(
            1
        )  # of each sample, by the regression on the others
        tried.append((float(missed.square().mean()), right(new @ weights, labels[taught:])))
    return min(tried)[1]


def trained(model: nn.Module, images: Tensor, labels: Tensor, taught: int, steps: int) -> float:
    """Train the network on the first `taught` images; return the accuracy on the others."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(taught, (min(taught, 64),))
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return right(model(images[taught:]), labels[taught:])


def right(scores: Tensor, labels: Tensor) -> float:
    """The share of samples whose own label has the highest score."""
    return float((scores.argmax(1) == labels).double().mean())


def main() -> None:
    """Three ways to learn from few labels."""
    parser = argparse.ArgumentParser(
        description="Kernel regression with the empirical NTK of a CNN, on digits."
    )
    parser.add_argument("--samples", type=int, default=1797)
    parser.add_argument("--labels", type=int, default=100, help="how many digits come with a label")
    parser.add_argument("--width", type=int, default=32, help="channels of the convolutions")
    parser.add_argument("--steps", type=int, default=500, help="of training the network")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images, labels = load(options.samples)
    model = network(options.width)
    pixels = images.flatten(1)
    linear = pixels @ pixels.T
    kernel = tangent_kernel(model, images)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(images):,} digits, {options.labels} of them with a label, a network of "
        f"{parameters:,} parameters; the others read right:"
    )
    for name, share in (
        (
            "ridge regression on pixels",
            regression(linear / linear.diagonal().mean(), labels, options.labels),
        ),
        ("the network, trained", trained(model, images, labels, options.labels, options.steps)),
        ("the network's kernel, untrained", regression(kernel, labels, options.labels)),
    ):
        print(f"{name:>34}  {share:6.1%}")
    print(
        f"The kernel, {len(kernel):,} x {len(kernel):,}, took no matrix of gradients of "
        f"{4 * parameters * len(kernel) / 1e6:,.0f} MB."
    )


if __name__ == "__main__":
    main()
