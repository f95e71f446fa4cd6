"""The influence of each training sample on a prediction, by projected gradients (TRAK).

It is checked against models that are trained without the sample.

TRAK (Park et al. 2023) linearises a trained classifier. With z_i the gradient of sample i's margin
log(p_i / (1 - p_i)), p_i the probability of its own label, leaving training sample i out is
predicted to lower the margin of sample t by

    z_t^T (Z^T R Z + l2 I)^-1 z_i (1 - p_i),        R the diagonal of p_i (1 - p_i),

where all gradients are projected to a few random directions, and the predictions of several
projections averaged. The check needs a model whose training has one answer: a logistic regression
on the 569 breast tumours that scikit-learn bundles, with all products of two features, 496 weights.
Models without a sample are trained exactly, many at once: Newton's method is mapped over what each
may see.

    python examples/influence.py                                      # ten seconds
    python examples/influence.py --directions 32 --projections 1      # too few
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor

import shardmap

L2 = 10.0
"""Weight of the penalty L2 / 2 * |weights|^2 in the loss, which is a sum over samples."""
TAKEN = 20
"""Samples taken out together in the second check."""


def load() -> tuple[Tensor, Tensor]:
    """The features, [569, 496], and the labels, 1 or -1, [569], in random order.

    Features are a constant, 30 standardised ones and their products.
    """
    bunch: Any = load_breast_cancer()
    x = torch.tensor(bunch.data)
    x = (x - x.mean(0)) / x.std(0)
    i, j = torch.triu_indices(x.shape[1], x.shape[1])
    features = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x, x[:, i] * x[:, j]], dim=1)
    order = torch.randperm(len(x))
    return features[order], torch.tensor(2.0 * bunch.target - 1, dtype=x.dtype)[order]


def margin(weights: Tensor, row: Tensor, label: Tensor) -> Tensor:
    """The logit of one sample's own label."""
    return label * (row @ weights)


def fit(start: Tensor, features: Tensor, labels: Tensor, kept: Tensor, steps: int) -> Tensor:
    """The weights [features] that minimise the loss over the samples that are kept (1, not 0).

    They are found by Newton's method from `start`.
    """
    weights = start
    for _ in range(steps):
        p = torch.sigmoid(features @ weights)
        slope = features.T @ ((p - (labels + 1) / 2) * kept) + L2 * weights
        bend = features.T @ ((p * (1 - p) * kept).unsqueeze(1) * features) + L2 * torch.eye(
            len(weights), dtype=weights.dtype
        )
        weights = weights - torch.linalg.solve(bend, slope)
    return weights


def influence(
    weights: Tensor,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    directions: int,
    projections: int,
) -> Tensor:
    """The predicted fall of each test margin without each training sample, [test, train]."""
    p = torch.sigmoid(train[1] * (train[0] @ weights))
    total = torch.zeros(len(test[0]), len(train[0]), dtype=weights.dtype)
    for seed in range(projections):
        gradients = shardmap.per_sample_grad(
            margin, reduce=shardmap.reduce.project(directions, seed=seed)
        )
        z, z_test = gradients(weights, *train), gradients(weights, *test)  # [N, directions] each
        bend = z.T @ ((p * (1 - p)).unsqueeze(1) * z) + L2 * torch.eye(directions, dtype=z.dtype)
        total += z_test @ torch.linalg.solve(bend, z.T) * (1 - p)
    return total / projections


def lowered(
    weights: Tensor, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], kept: Tensor
) -> Tensor:
    """The real fall of the test samples' margins, [models, test].

    Each model is trained on the samples that its row of `kept` keeps.
    """
    fewer = shardmap.vmap(lambda row: fit(weights, *train, row, steps=4))(
        kept
    )  # [models, features]
    return test[1] * (test[0] @ weights) - test[1] * (fewer @ test[0].T)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of each row of `a` with that of `b`; the mean over the rows."""
    a, b = (
        F.normalize(r - r.mean(1, keepdim=True), dim=1)
        for r in (a.argsort(1).argsort(1).double(), b.argsort(1).argsort(1).double())
    )
    return float((a * b).sum(1).mean())


def main() -> None:
    """Predict, train without, and compare."""
    parser = argparse.ArgumentParser(
        description="Influence of training samples by projected gradients, checked by training "
        "without them."
    )
    parser.add_argument(
        "--directions",
        type=int,
        default=128,
        help="of each projection; the gradients have 496 entries",
    )
    parser.add_argument("--projections", type=int, default=8)
    parser.add_argument(
        "--left-out", type=int, default=100, help="how many samples are left out, each by itself"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    features, labels = load()
    train, test = (features[:400], labels[:400]), (features[400:], labels[400:])
    everything = torch.ones(400, dtype=features.dtype)
    weights = fit(torch.zeros_like(features[0]), *train, everything, steps=15)
    right = (test[1] * (test[0] @ weights) > 0).double().mean()
    print(
        f"logistic regression with {len(weights)} weights, {right:.1%} of {len(test[0])} new "
        "tumours right"
    )
    predicted = influence(weights, train, test, options.directions, options.projections)

    out = torch.randperm(400)[: options.left_out]
    fell = lowered(
        weights, train, test, 1 - F.one_hot(out, 400).to(features.dtype)
    )  # [left out, test]
    alike = (
        train[1] * test[1].unsqueeze(1) * (test[0] @ train[0].T)
    )  # inner products of the gradients themselves
    print(
        f"{len(out)} samples left out in turn; rank correlation with what the margins of new "
        "samples really do, mean over them:"
    )
    name = f"influence, {options.projections} projections to {options.directions}"
    print(f"{'inner product of gradients':>40}  {rank_correlation(alike[:, out], fell.T):6.3f}")
    print(f"{name:>40}  {rank_correlation(predicted[:, out], fell.T):6.3f}")

    best = predicted[:20].topk(TAKEN, dim=1).indices  # of twenty new samples
    anyone = torch.stack([torch.randperm(400)[:TAKEN] for _ in range(20)])
    falls = []
    for chosen in (best, anyone):
        kept = torch.ones(20, 400, dtype=features.dtype).scatter(1, chosen, 0.0)
        falls.append(lowered(weights, train, (test[0][:20], test[1][:20]), kept).diagonal().mean())
    print(
        f"Without the {TAKEN} training samples that it names, the margin of a new sample falls by "
        f"{falls[0]:.2f} on average, "
        f"without any {TAKEN} by {falls[1]:.2f}."
    )


if __name__ == "__main__":
    main()
