"""Standard errors of a logistic regression that hold when the model is wrong.

They come from the sandwich estimator, which is made of per-sample gradients.

The usual standard errors trust the model: they are the roots of the diagonal of H^-1, H the Hessian
of the total loss. The robust ones (Huber 1967, White 1982) are those of H^-1 (G^T G) H^-1, where
row i of G is the gradient of sample i's loss. Both matrices come from one mapped call each. Data:
the 569 breast tumours that scikit-learn bundles.

    python examples/robust_standard_errors.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor

import shardmap

FEATURES = ("mean radius", "mean texture", "mean smoothness", "mean symmetry")


def load() -> tuple[Tensor, Tensor]:
    """Four standardised features and a constant, [569, 5], and 1 for a malignant tumour, [569]."""
    bunch: Any = load_breast_cancer()
    columns = [list(bunch.feature_names).index(name) for name in FEATURES]
    features = torch.tensor(bunch.data[:, columns], dtype=torch.float64)
    features = (features - features.mean(0)) / features.std(0)
    return torch.cat(
        [features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1
    ), torch.tensor(1.0 - bunch.target)


def loss(weights: Tensor, features: Tensor, malignant: Tensor) -> Tensor:
    """The loss of one sample, or the sum over a batch."""
    return F.binary_cross_entropy_with_logits(features @ weights, malignant, reduction="sum")


def fit(features: Tensor, malignant: Tensor) -> Tensor:
    """The weights that minimise the loss, [5]."""
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss(weights, features, malignant)
        total.backward()
        return total

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]  LBFGS takes a closure that returns a tensor; its stub says float
    return weights.detach().requires_grad_()


def standard_errors(weights: Tensor, features: Tensor, malignant: Tensor) -> tuple[Tensor, Tensor]:
    """The usual and the robust standard error of each weight, [5] each."""

    def gradient(row: Tensor, label: Tensor) -> Tensor:
        return torch.autograd.grad(loss(weights, row, label), weights)[0]

    gradients = shardmap.vmap(gradient, chunk_size=128)(features, malignant)  # [569, 5]
    (total,) = torch.autograd.grad(loss(weights, features, malignant), weights, create_graph=True)
    identity = torch.eye(len(weights), dtype=weights.dtype)
    hessian = shardmap.vmap(lambda v: torch.autograd.grad(total, weights, v, retain_graph=True)[0])(
        identity
    )  # [5, 5]
    bread = torch.linalg.inv(hessian)
    return bread.diagonal().sqrt(), (bread @ gradients.T @ gradients @ bread).diagonal().sqrt()


def main() -> None:
    """Fit, and print weights with both standard errors."""
    features, malignant = load()
    weights = fit(features, malignant)
    usual, robust = standard_errors(weights, features, malignant)
    print(f"{'feature':>16}  {'weight':>7}  {'usual':>6}  {'robust':>6}")
    for name, weight, a, b in zip(
        (*FEATURES, "constant"), weights.tolist(), usual.tolist(), robust.tolist(), strict=True
    ):
        print(f"{name:>16}  {weight:7.3f}  {a:6.3f}  {b:6.3f}")


if __name__ == "__main__":
    main()
