"""Report on a private step: its direction, its effect on the loss, and its privacy budget."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from private import epsilon
from torch import Tensor, nn

from shardmap.errors import ConfigError
from shardmap.jobs import Bounds, Findings, Outcome, save_tensors
from shardmap.jobs.report import FAINT, INK, RIGHT, WRONG


def private_step(
    outcome: Outcome,
    *,
    max_norm: Annotated[float, Bounds(above=0)] = 1.0,
    noise_multiplier: Annotated[float, Bounds(above=0)] = 20.0,
    steps: Annotated[int, Bounds(least=1)] = 100,
    delta: Annotated[float, Bounds(above=0, most=0.1)] = 1e-5,
    length: Annotated[float, Bounds(above=0)] = 0.1,
) -> Findings:
    """Compare a clipped, noised sum of gradients with their mean.

    Compared are the directions, and the fall of the loss after a step of the same length.

    Args:
        outcome: Columns `image` and `label`; the run's reductions are named `private`
            (clipped_sum), `mean` and `norms`.
        max_norm: As in the run's clipped_sum.
        noise_multiplier: As in the run's clipped_sum.
        steps: How many such steps a training would take, for the privacy that it spends.
        delta: With which probability the bound on privacy may fail.
        length: Of the steps that are tried.

    Returns:
        The share of clipped samples, the cosine between sum and mean, what both steps do to the
        loss, and the epsilon spent.

    Raises:
        ConfigError: The run has not reduced to these three.
    """
    tensors = outcome.tensors()
    parts = {
        name: {
            k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")
        }
        for name in ("private", "mean")
    }
    parameters = dict(outcome.model.named_parameters())
    if "norms" not in tensors or any(set(part) != set(parameters) for part in parts.values()):
        raise ConfigError(
            "reduce: the report needs {private: {name: clipped_sum, ...}, mean: mean, norms: norm} "
            "of all parameters; write it so"
        )
    norms = tensors["norms"]
    clipped = float((norms > max_norm).double().mean())
    private, mean = (
        torch.cat([part[name].flatten() for name in parameters]) for part in parts.values()
    )
    cosine = float(F.cosine_similarity(private, mean, dim=0))
    images, labels = outcome.dataset["image"], outcome.dataset["label"]
    before = _loss(outcome.model, images, labels)
    falls = [
        before - _loss(_moved(outcome.model, direction, length), images, labels)
        for direction in (private, mean)
    ]
    spent = epsilon(steps, noise_multiplier, delta)
    save_tensors(
        outcome.folder / "step.safetensors", {"private": private, "mean": mean, "norms": norms}
    )
    _draw(outcome, norms, max_norm, clipped)
    numbers = {
        "clipped": round(clipped, 5),
        "cosine": round(cosine, 5),
        "loss": round(before, 5),
        "loss_fell_private": round(falls[0], 6),
        "loss_fell_mean": round(falls[1], 6),
        "epsilon": round(spent, 4),
        "steps": steps,
        "delta": delta,
    }
    headline = (
        f"{clipped:.1%} of {len(norms):,} gradients are longer than {max_norm:g} and are clipped; "
        "the private sum has a cosine of "
        f"{cosine:.3f} with their mean.\nA step of length {length:g} along it takes {falls[0]:.4f} "
        f"off a loss of {before:.3f}, along the "
        f"mean {falls[1]:.4f}; {steps} such steps spend epsilon {spent:.2f} at delta {delta:g}."
    )
    return Findings(headline, numbers)


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(images), labels))


def _moved(model: nn.Module, direction: Tensor, length: float) -> nn.Module:
    """A copy of the model, a step of that length down a direction."""
    moved = copy.deepcopy(model)
    step = length * F.normalize(direction, dim=0)
    parameters = list(moved.parameters())
    with torch.no_grad():
        for parameter, part in zip(
            parameters, step.split([p.numel() for p in parameters]), strict=True
        ):
            parameter -= part.view_as(parameter)
    return moved


def _draw(outcome: Outcome, norms: Tensor, max_norm: float, clipped: float) -> None:
    """A histogram of the gradients' norms, and where they are clipped."""
    figure = Figure(figsize=(8.4, 4.4), facecolor="white")
    axes: Any = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.97, top=0.80, bottom=0.12)
    doublings = (
        norms.clamp_min(1e-3 * max_norm) / max_norm
    ).log2()  # bars are a quarter of one wide, and one begins at max_norm
    first, last = int(4 * doublings.min()) - 1, int(4 * doublings.max()) + 2
    edges = [max_norm * 2 ** (quarter / 4) for quarter in range(first, last)]
    _, _, bars = axes.hist(norms.clamp_min(1e-3 * max_norm).numpy(), bins=edges, rwidth=0.94)
    for quarter, bar in zip(range(first, last), bars, strict=False):
        bar.set_color(WRONG if quarter >= 0 else RIGHT)
    axes.set_xscale("log")
    axes.axvline(max_norm, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlabel("norm of a sample's gradient, all parameters together", color=INK)
    axes.set_ylabel("samples", color=INK)
    for spine in axes.spines.values():
        spine.set(color="#d5d8df")
    figure.text(0.09, 0.945, "What clipping takes", fontsize=13, color=INK, weight="bold", va="top")
    figure.text(
        0.09,
        0.87,
        f"{clipped:.1%} of the gradients are longer than {max_norm:g} (red)",
        fontsize=9,
        color=FAINT,
        va="top",
    )
    figure.savefig(outcome.folder / "norms.png", dpi=140)
