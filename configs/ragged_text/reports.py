"""Report on gradients of sentences of unequal lengths, with and without padding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from text import loss_gradient, padded, taught
from torch import Tensor

import shardmap
from shardmap.errors import ConfigError
from shardmap.jobs import Findings, Outcome, save_tensors
from shardmap.jobs.report import FAINT, INK, RIGHT, WRONG, write_csv


def gradients_by_length(outcome: Outcome) -> Findings:
    """Compare the gradient norms of the sentences alone with those of padded ones.

    Args:
        outcome: Columns `words` and `topic`; one output, the norm of each sentence's gradient, [N].

    Returns:
        How many new sentences are read right, how far the norms are from those of padded sentences
        whose padding is left out, how many a reader that takes the padding for words would get
        wrong, and how much harder new sentences pull than those taught.

    Raises:
        ConfigError: The output is no norm for each sentence.
    """
    (words, length), topic = padded(outcome.dataset["words"]), outcome.dataset["topic"]
    (norms, *others) = outcome.tensors().values()
    if others or norms.shape != length.shape:
        raise ConfigError(
            "reduce: the report needs the norm of each sentence's gradient; write reduce: norm"
        )
    model, first = outcome.model, taught(outcome.dataset)

    def gradient(*sample: Tensor) -> dict[str, Tensor]:
        return loss_gradient(model, *sample)

    masked = shardmap.vmap(gradient, reduce="norm")(words, topic, length)
    fooled = shardmap.vmap(gradient, reduce="norm")(words, topic)
    with torch.no_grad():
        logits = model(words, length)
    right = (logits.argmax(1) == topic).double()
    difference = float((norms - masked).abs().max() / norms.max())
    changed = float(((fooled - norms).abs() > 0.1 * norms).double().mean())
    columns = {
        "norm": norms,
        "norm_of_padded": masked,
        "loss": F.cross_entropy(logits, topic, reduction="none"),
        "length": length,
    }
    save_tensors(outcome.folder / "norms.safetensors", columns)
    write_csv(
        outcome.folder / "norms.csv", {name: column.tolist() for name, column in columns.items()}
    )
    _draw(outcome, norms, fooled, length, first)
    harder = float(norms[first:].median() / norms[:first].median())
    numbers = {
        "new_read_right": round(float(right[first:].mean()), 5),
        "taught_read_right": round(float(right[:first].mean()), 5),
        "difference_of_padded": difference,
        "changed_if_padding_were_read": round(changed, 5),
        "new_pull_harder": round(harder, 4),
    }
    headline = (
        f"{numbers['new_read_right']:.1%} of {len(norms) - first} new sentences are read right; "
        f"they pull {harder:.1f} times as hard as "
        "those taught (medians).\nPadded sentences have the same gradient norms where padding is "
        f"left out, within {difference:.0e} of the largest; "
        f"if padding were read as words, {changed:.0%} of them would be wrong by more than a tenth."
    )
    return Findings(headline, numbers)


def _draw(outcome: Outcome, norms: Tensor, fooled: Tensor, length: Tensor, first: int) -> None:
    """Norms by length, of sentences taught and new, and what padding would make of each."""
    figure = Figure(figsize=(10.4, 4.6), facecolor="white")
    panels: Any = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.78, bottom=0.12, wspace=0.2)
    shifted = length + 0.6 * (
        torch.rand(len(length), generator=torch.Generator().manual_seed(0)) - 0.5
    )  # so that dots do not cover others
    for rows, color, name in (
        (slice(0, first), RIGHT, "taught"),
        (slice(first, None), WRONG, "new"),
    ):
        panels[0].scatter(
            shifted[rows].numpy(),
            norms[rows].numpy(),
            s=7,
            color=color,
            alpha=0.6,
            linewidths=0,
            label=name,
        )
        panels[1].scatter(
            norms[rows].numpy(), fooled[rows].numpy(), s=7, color=color, alpha=0.6, linewidths=0
        )
    panels[0].set(yscale="log", xlabel="words", ylabel="norm of the gradient")
    panels[0].legend(fontsize=8.5, frameon=False)
    ends = [float(norms.min()), float(norms.max())]
    panels[1].plot(ends, ends, color=INK, linewidth=0.8)
    panels[1].set(
        xscale="log",
        yscale="log",
        xlabel="norm of the gradient",
        ylabel="the same, if padding were read as words",
    )
    for axes in panels:
        axes.tick_params(labelsize=8.5)
        for spine in axes.spines.values():
            spine.set(color="#d5d8df")
    figure.text(
        0.07,
        0.945,
        "Which sentences pull hardest at the network?",
        fontsize=13,
        color=INK,
        weight="bold",
        va="top",
    )
    note = (
        f"gradients of {len(norms):,} sentences of unequal lengths, "
        "computed as they are, without padding"
    )
    figure.text(0.07, 0.87, note, fontsize=9, color=FAINT, va="top")
    figure.savefig(outcome.folder / "norms.png", dpi=140)
