"""Wrong labels, found by the gradient norms of their samples while a network learns.

A sample's influence on its own loss is the sum over training of the learning rate times its squared
gradient norm (TracIn's self-influence, Pruthi et al. 2020). A network learns what most labels agree
on, so a wrong label keeps a large gradient until it is learnt by heart. Here a fifth of the labels
of scikit-learn's 1,797 handwritten digits is replaced by another class, a small convolutional
network is trained on all of them, and after each epoch one call gives the norms of all per-sample
gradients; the gradients themselves are never in memory. Beside it, what the losses alone would
find: the last one, and the mean over the same epochs.

    python examples/find_mislabelled.py
    python examples/find_mislabelled.py --flipped 0.1 --seed 1
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import shardmap


def load(samples: int, flipped: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images, [N, 1, 8, 8], labels of which a share is wrong, [N], and which ones are, [N]."""
    bunch: Any = load_digits()
    rows = torch.randperm(len(bunch.target))[:samples]
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)[rows] / 16
    truth = torch.tensor(bunch.target)[rows]
    wrong = torch.zeros(len(rows), dtype=torch.bool)
    wrong[torch.randperm(len(rows))[: round(flipped * len(rows))]] = True
    return (
        images,
        torch.where(wrong, (truth + torch.randint(1, 10, truth.shape)) % 10, truth),
        wrong,
    )


def network() -> nn.Module:
    """A network of 5,050 parameters for one image or a batch."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(-3),
        nn.Linear(256, 10),
    )  # fmt: skip


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Train `model`.

    Each sample's self-influence, summed over the epochs, and its loss after each, [N] and [epochs,
    N].
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    norms = shardmap.per_sample_grad(model, F.cross_entropy, reduce=shardmap.reduce.norm())
    influence, losses = torch.zeros(len(images)), torch.zeros(epochs, len(images))
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        influence += rate * norms(images, labels).square()
        with torch.no_grad():
            losses[epoch] = F.cross_entropy(model(images), labels, reduction="none")
    return influence, losses


def precision(scores: Tensor, wrong: Tensor, first: int) -> float:
    """The share of wrong labels among those with the highest scores."""
    return float(wrong[scores.topk(first).indices].double().mean())


def main() -> None:
    """Flip, train, rank, and count what was found."""
    parser = argparse.ArgumentParser(description="Find wrong labels by per-sample gradient norms.")
    parser.add_argument("--samples", type=int, default=1797)
    parser.add_argument(
        "--flipped", type=float, default=0.2, help="share of the labels that is made wrong"
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images, labels, wrong = load(options.samples, options.flipped)
    influence, losses = train(network(), images, labels, options.epochs)
    count = int(wrong.sum())
    print(
        f"{len(labels):,} digits, {count} labels made wrong\nshare of wrong labels among the "
        "first, ranked by"
    )
    print(f"{'first':>6}  {'gradients':>9}  {'mean loss':>9}  {'last loss':>9}  {'chance':>6}")
    for first in (count // 4, count // 2, count, 2 * count):
        found = [
            precision(scores, wrong, first) for scores in (influence, losses.mean(0), losses[-1])
        ]
        print(
            f"{first:6}  {found[0]:9.1%}  {found[1]:9.1%}  {found[2]:9.1%}  "
            f"{count / len(labels):6.0%}"
        )
    print(
        f"Of the {count} samples that pulled hardest at the network, "
        f"{precision(influence, wrong, count):.1%} have a wrong label."
    )


if __name__ == "__main__":
    main()
