"""Report on the gradients of the digits: a ranking of the labels that look wrong."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from digits import CLASSES
from torch import Tensor

from shardmap.errors import ConfigError
from shardmap.jobs import Bounds, Findings, Outcome, save_tensors
from shardmap.jobs.report import Tile, contact_sheet, format_table, write_csv

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
