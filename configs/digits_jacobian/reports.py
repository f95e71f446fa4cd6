"""Report on the Jacobians of the digits: the pixels that the network looks at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from digits import CLASSES
from matplotlib.figure import Figure
from torch import Tensor

from shardmap.jobs import Findings, Outcome, save_tensors
from shardmap.jobs.report import FAINT, INK, write_csv


def sensitivity_maps(outcome: Outcome) -> Findings:
    """Show the pixels that the network's decisions depend on, and test what the Jacobian predicts.

    To first order, the nearest decision boundary lies `margin / |gradient of the margin|` away,
    along that gradient (DeepFool's first step, Moosavi-Dezfooli et al. 2016). The check takes that
    step in every image, a tenth longer, and counts the decisions that change.

    Args:
        outcome: Columns `image` and `true_label`; outputs the Jacobian, [N, 10, 1, 8, 8].

    Returns:
        The share of decisions that change, the median distance, and the median Frobenius norm of
        the Jacobian.

    Raises:
        ConfigError: There are no Jacobians of single samples.
    """
    images, true = outcome.dataset["image"], outcome.dataset["true_label"]
    (jacobian,) = outcome.rows()
    samples = len(images)
    rows = torch.arange(samples)
    with torch.no_grad():
        logits = outcome.model(images)
    predicted = logits.argmax(1)
    margins = logits[rows, predicted].unsqueeze(1) - logits  # [N, 10]
    slopes = jacobian[rows, predicted].unsqueeze(1) - jacobian  # [N, 10, 1, 8, 8]
    distances = margins / slopes.flatten(2).norm(dim=2)  # [N, 10]
    distances[rows, predicted] = torch.inf  # a class has no boundary with itself
    distance, rival = distances.min(dim=1)
    slope = slopes[rows, rival]
    step = -1.1 * distance.view(-1, 1, 1, 1) * F.normalize(slope.flatten(1), dim=1).view_as(slope)
    with torch.no_grad():
        changed = outcome.model(images + step).argmax(1) != predicted
    norms = jacobian.flatten(1).norm(dim=1)
    save_tensors(
        outcome.folder / "scores.safetensors",
        {
            "distance": distance,
            "jacobian_norm": norms,
            "predicted": predicted,
            "rival": rival,
            "true": true,
            "changed": changed,
        },
    )
    write_csv(
        outcome.folder / "ranking.csv",
        {
            "sample": (order := distance.argsort()).tolist(),
            "true": true[order].tolist(),
            "predicted": predicted[order].tolist(),
            "rival": rival[order].tolist(),
            "distance": [round(value, 6) for value in distance[order].tolist()],
        },
    )
    _draw_sensitivity(outcome, jacobian, predicted)
    share = float(changed.double().mean())
    size = float(images.flatten(1).norm(dim=1).median())
    numbers = {
        "changed_by_predicted_step": round(share, 5),
        "median_distance": round(float(distance.median()), 5),
        "median_jacobian_norm": round(float(norms.median()), 5),
        "accuracy": round(float((predicted == true).double().mean()), 5),
    }
    headline = (
        f"The step that the Jacobian predicts changes {share:.1%} of the {samples:,} decisions; "
        f"the median distance to the nearest boundary is {float(distance.median()):.2f}, the "
        f"median norm of an image {size:.2f}."
    )
    return Findings(headline, numbers)


def _draw_sensitivity(outcome: Outcome, jacobian: Tensor, predicted: Tensor) -> None:
    """Draw for each class one digit, its signed gradient, and the class's mean sensitivity."""
    images, true = outcome.dataset["image"], outcome.dataset["true_label"]
    figure = Figure(figsize=(11.2, 4.5), facecolor="white")
    figure.text(
        0.02, 0.965, "What the network looks at", fontsize=14, weight="bold", color=INK, va="top"
    )
    note = (
        "Jacobian of ten logits with respect to 64 pixels, "
        f"for each of {len(images):,} digits in one mapped call"
    )
    figure.text(0.02, 0.895, note, fontsize=9, color=FAINT, va="top")
    grid = figure.subplots(3, CLASSES)
    figure.subplots_adjust(left=0.135, right=0.985, top=0.83, bottom=0.03, hspace=0.1, wspace=0.1)
    magnitude = jacobian.square().sum(dim=(1, 2)).sqrt()  # [N, 8, 8]: all logits together
    means = torch.stack([magnitude[true == digit].mean(0) for digit in range(CLASSES)])
    for digit in range(CLASSES):
        # the first digit of the class that the network gets right; the first one if it gets none
        members = (true == digit).nonzero().flatten()
        right = members[predicted[members] == digit]
        row = int((right if len(right) else members)[0])
        own = jacobian[row, int(predicted[row]), 0]
        limit = float(own.abs().max()) or 1.0
        grid[0, digit].imshow(images[row, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        grid[1, digit].imshow(own.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        grid[2, digit].imshow(
            means[digit].numpy(), cmap="magma", vmin=0, vmax=float(means.max()) or 1.0
        )
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color="#d5d8df", linewidth=0.8)
    labels = (
        "one digit",
        "its own logit:\nmore ink raises (red)\nor lowers (blue) it",
        "all logits,\nmean of the class:\nbright is sensitive",
    )
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(
            label, rotation=0, ha="right", va="center", fontsize=8.5, color=INK, labelpad=8
        )
    figure.savefig(outcome.folder / "sensitivity.png", dpi=150)
