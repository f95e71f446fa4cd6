"""Reports on the digits: which labels look wrong, and what the network looks at."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shardmap._extras import require
from shardmap.errors import ConfigError
from shardmap.jobs.base import Findings, Outcome
from shardmap.jobs.config import Bounds
from shardmap.jobs.digits import CLASSES
from shardmap.jobs.folder import save_tensors
from shardmap.jobs.report import FAINT, INK, Tile, contact_sheet, format_table, write_csv

Score = Literal["gradient_norm", "fisher_norm", "class_cosine"]


def suspicious_labels(
    outcome: Outcome,
    *,
    score: Score = "gradient_norm",
    first: Annotated[float, Bounds(above=0, most=1)] = 0.05,
    top: Annotated[int, Bounds(least=1, most=100)] = 25,
) -> Findings:
    """Rank the samples by how hard their given label pulls at the trained network.

    A network trained for few epochs follows what most labels agree on; a wrong label then asks for
    a large change of the weights, which is its gradient. The squared norm is the sample's influence
    on its own loss (TracIn's self-influence, Pruthi et al. 2020).

    Args:
        outcome: Columns `image`, `label`, `true_label` and `flipped`; outputs one gradient per
            parameter.
        score: `gradient_norm`: Euclidean norm. `fisher_norm`: the same with each parameter in units
            of its mean square gradient. `class_cosine`: how far the gradient points away from those
            of the samples with the same given label.
        first: The share of the ranking in which the flipped labels are counted.
        top: How many samples the table and the picture show.

    Returns:
        How many of the flipped labels are among the first, against chance and against a ranking by
        the loss alone.

    Raises:
        ConfigError: Some gradients are not finite, or there are none of single samples.
    """
    images, given, true, flipped = (
        outcome.dataset[name] for name in ("image", "label", "true_label", "flipped")
    )
    samples = len(images)
    with torch.no_grad():
        logits = outcome.model(images)
    predicted = logits.argmax(1)
    losses = F.cross_entropy(logits, given, reduction="none")
    gradients = torch.cat(
        [leaf.reshape(samples, -1) for leaf in outcome.rows()], dim=1
    )  # [N, parameters]
    scores = score_gradients(gradients, given, score)
    if not bool(torch.isfinite(scores).all()):
        raise ConfigError(
            "model.init_args.learning_rate: training diverged, some per-sample gradients are not "
            "finite; give a smaller one"
        )

    order = scores.argsort(descending=True)
    count = max(1, round(first * samples))
    found = int(flipped[order[:count]].sum())
    found_by_loss = int(flipped[losses.argsort(descending=True)[:count]].sum())
    wrong = int(flipped.sum())
    chance = count * wrong / samples

    def table(rows: Tensor) -> dict[str, list[Any]]:
        return {
            "rank": list(range(1, len(rows) + 1)),
            "sample": rows.tolist(),
            "given": given[rows].tolist(),
            "predicted": predicted[rows].tolist(),
            "true": true[rows].tolist(),
            "flipped": ["yes" if value else "no" for value in flipped[rows].tolist()],
            "score": [round(value, 6) for value in scores[rows].tolist()],
        }

    write_csv(outcome.folder / "ranking.csv", table(order))
    (outcome.folder / "suspicious.txt").write_text(
        format_table(table(order[:top])) + "\n", encoding="utf-8"
    )
    columns = {
        "score": scores,
        "loss": losses,
        "given": given,
        "predicted": predicted,
        "true": true,
        "flipped": flipped,
    }
    save_tensors(outcome.folder / "scores.safetensors", columns)
    in_top = int(flipped[order[:top]].sum())
    contact_sheet(
        outcome.folder / "suspicious.png",
        [
            Tile(
                images[row, 0],
                (
                    f"given {int(given[row])}, predicted {int(predicted[row])}",
                    f"true {int(true[row])}{', flipped' if flipped[row] else ''}",
                ),
                marked=bool(flipped[row]),
            )
            for row in order[:top].tolist()
        ],
        title=f"The {top} most suspicious labels of {samples:,}",
        subtitle=f"ranked by {score.replace('_', ' ')}; {in_top} of them were flipped on purpose "
        "(framed)",
    )
    headline = (
        f"{found} of the {wrong} flipped labels are among the first {count} ({first:.0%}) of the "
        "ranking; "
        f"chance would give {chance:.1f}, a ranking by the loss alone gives {found_by_loss}."
    )
    numbers = {
        "score": score,
        "flipped": wrong,
        "first": count,
        "found": found,
        "found_by_chance": round(chance, 3),
        "found_by_loss": found_by_loss,
        "accuracy_on_true_labels": round(float((predicted == true).double().mean()), 5),
    }
    return Findings(f"{format_table(table(order[:10]))}\n{headline}", numbers)


def score_gradients(gradients: Tensor, labels: Tensor, score: Score) -> Tensor:
    """Score each sample by its gradient, higher for more suspicious.

    Args:
        gradients: [N, parameters].
        labels: [N], as given.
        score: See `suspicious_labels`.

    Returns:
        [N].
    """
    if score == "gradient_norm":
        return gradients.norm(dim=1)
    if score == "fisher_norm":
        fisher = gradients.square().mean(dim=0)  # diagonal of the empirical Fisher matrix
        return (gradients.square() / (fisher + 0.1 * fisher.mean())).sum(dim=1).sqrt()
    directions = F.normalize(gradients, dim=1)
    means = torch.zeros(CLASSES, gradients.shape[1]).index_add_(0, labels, directions)
    return 1 - (directions * F.normalize(means, dim=1)[labels]).sum(dim=1)


def sensitivity_maps(outcome: Outcome) -> Findings:
    """Show which pixels the network's decisions hang on, and check the Jacobian by what it predicts.

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
    """Per class: one digit, its signed gradient, and the mean sensitivity of the class."""
    figure_module = require("matplotlib.figure", extra="run", purpose="to draw pictures")
    images, true = outcome.dataset["image"], outcome.dataset["true_label"]
    figure = figure_module.Figure(figsize=(11.2, 4.5), facecolor="white")
    figure.text(
        0.02, 0.965, "What the network looks at", fontsize=14, weight="bold", color=INK, va="top"
    )
    note = f"Jacobian of ten logits with respect to 64 pixels, for each of {len(images):,} digits in one mapped call"
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
