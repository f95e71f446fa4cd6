"""Report on a kernel: the share of digits that regression with it reads right."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from digits import CLASSES
from matplotlib.figure import Figure
from torch import Tensor

from shardmap.errors import ConfigError
from shardmap.jobs import Bounds, Findings, Outcome, save_tensors
from shardmap.jobs.report import FAINT, INK

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried for each regression, in units of the kernel's mean diagonal."""


def kernel_regression(
    outcome: Outcome, *, labels: Annotated[int, Bounds(least=2)] = 100
) -> Findings:
    """Learn a few labels by kernel ridge regression and read the other digits.

    The regression is made twice: with the network's kernel, and with that of the pixels.

    Args:
        outcome: Columns `image` and `true_label`; one output, the kernel, [N, N], or gradients of
            each sample, [N, ...] each.
        labels: How many digits, chosen at random, are learnt from.

    Returns:
        The share of the other digits that each reads right.

    Raises:
        ConfigError: The outputs are neither, or no digits are left to read.
    """
    images, true = outcome.dataset["image"], outcome.dataset["true_label"]
    samples = len(images)
    if labels >= samples:
        raise ConfigError(
            f"report.labels: {labels} of {samples} digits leave none to read; give fewer"
        )
    kernel = _kernel(outcome, samples)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    pixels = images.flatten(1) - images.mean()
    found, ridge = regression(kernel[order][:, order], true[order], labels)
    plain, _ = regression((pixels @ pixels.T)[order][:, order], true[order], labels)
    save_tensors(outcome.folder / "kernel.safetensors", {"kernel": kernel})
    _draw(outcome, kernel)
    numbers = {
        "labels": labels,
        "read_right": round(found, 5),
        "read_right_by_pixels": round(plain, 5),
        "ridge": ridge,
    }
    headline = (
        f"From {labels} labels, regression with the untrained network's tangent kernel reads "
        f"{found:.1%} of the other {samples - labels:,} "
        f"digits right, with the pixels' own {plain:.1%}."
    )
    return Findings(headline, numbers)


def regression(kernel: Tensor, labels: Tensor, taught: int) -> tuple[float, float]:
    """Learn the first labels by kernel ridge regression and read the others.

    The ridge is the one with the least leave-one-out error.

    Args:
        kernel: [N, N].
        labels: [N], 0 to 9.
        taught: How many are learnt from.

    Returns:
        The share of the others that is right, and the ridge.
    """
    kernel = kernel.double() / kernel.diagonal().double().mean()
    targets = F.one_hot(labels[:taught], CLASSES).double() - 1 / CLASSES
    tried = []
    for ridge in RIDGES:
        inverse = torch.linalg.inv(
            kernel[:taught, :taught] + ridge * torch.eye(taught, dtype=kernel.dtype)
        )
        weights = inverse @ targets
        missed = weights / inverse.diagonal().unsqueeze(
            1
        )  # each sample's error by the others' regression (Wahba 1990)
        right = ((kernel[taught:, :taught] @ weights).argmax(1) == labels[taught:]).double().mean()
        tried.append((float(missed.square().mean()), float(right), ridge))
    return min(tried)[1:]


def _kernel(outcome: Outcome, samples: int) -> Tensor:
    """The kernel, which the run has reduced to, or that of the gradients that it has kept."""
    tensors = list(outcome.tensors().values())
    if len(tensors) == 1 and tensors[0].shape == (samples, samples):
        return tensors[0]
    if any(len(t) != samples for t in tensors):
        raise ConfigError(
            "reduce: the report needs the kernel of all samples, or their gradients; write reduce: "
            "gram"
        )
    rows = torch.cat([t.reshape(samples, -1) for t in tensors], dim=1)
    return rows @ rows.T


def _draw(outcome: Outcome, kernel: Tensor) -> None:
    """The kernel's cosines, digits sorted by label."""
    figure = Figure(figsize=(7.4, 7.4), facecolor="white")
    axes: Any = figure.subplots()
    figure.subplots_adjust(left=0.07, right=0.90, top=0.86, bottom=0.05)
    labels = outcome.dataset["true_label"]
    order = labels.argsort(stable=True)
    lengths = kernel.diagonal().sqrt()
    cosines = (kernel / (lengths.unsqueeze(1) * lengths))[order][:, order]
    low = float(
        cosines.flatten()[:: 1 + cosines.numel() // 1_000_000].quantile(0.02)
    )  # of some: torch refuses more than 2^24
    drawn = axes.imshow(cosines.numpy(), cmap="magma", vmin=low, vmax=1.0)
    edges = labels.bincount(minlength=CLASSES).cumsum(0)
    middles = edges - labels.bincount(minlength=CLASSES) / 2
    for side in (axes.set_xticks, axes.set_yticks):
        side(middles.tolist(), [str(digit) for digit in range(CLASSES)])
    axes.tick_params(length=0, colors=INK, labelsize=9)
    figure.colorbar(drawn, ax=axes, fraction=0.045, pad=0.02).ax.tick_params(
        labelsize=8, colors=FAINT
    )
    figure.text(
        0.07,
        0.955,
        "What an untrained network thinks alike",
        fontsize=13,
        color=INK,
        weight="bold",
        va="top",
    )
    note = (
        "cosines of the gradients of all pairs of digits, sorted by label: "
        "the empirical tangent kernel"
    )
    figure.text(0.07, 0.915, note, fontsize=9, color=FAINT, va="top")
    figure.savefig(outcome.folder / "kernel.png", dpi=130)
