"""Report on a learned potential: its second derivatives beside those of the real one."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from potential import mueller_brown_hessian

from shardmap.errors import ConfigError
from shardmap.jobs import Findings, Outcome, save_tensors
from shardmap.jobs.report import FAINT, INK


def curvature(outcome: Outcome) -> Findings:
    """Compare the learned potential's Hessian with the one that calculus gives.

    The network has seen energies and forces only; its second derivatives are what it makes of them,
    and decide how a molecule vibrates and at which rate it crosses a pass.

    Args:
        outcome: Column `point`; outputs the Hessian of the learned energy, [N, 2, 2].

    Returns:
        The error of the Laplacian, and at how many points as many directions bend down as should.

    Raises:
        ConfigError: Training diverged, or there are no Hessians of single samples.
    """
    (learned,) = outcome.rows()
    place = outcome.dataset["point"]
    exact = mueller_brown_hessian(place)
    if not bool(torch.isfinite(learned).all()):
        raise ConfigError(
            "model.init_args.rounds: training diverged, some second derivatives are not finite; "
            "give fewer"
        )
    laplacian, expected = (h.diagonal(dim1=1, dim2=2).sum(1) for h in (learned, exact))
    error = float((laplacian - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    down, should = ((torch.linalg.eigvalsh(h) < 0).sum(1) for h in (learned, exact))
    same = float((down == should).double().mean())
    lopsided = float((learned - learned.mT).abs().max() / learned.abs().max())
    save_tensors(
        outcome.folder / "curvature.safetensors",
        {"point": place, "laplacian": laplacian, "expected": expected},
    )
    _draw(outcome, laplacian, expected)
    numbers = {
        "laplacian_relative_error": round(error, 6),
        "same_bends": round(same, 5),
        "pass_like": round(float((should == 1).double().mean()), 5),
        "asymmetry": lopsided,
    }
    headline = (
        f"The Laplacian of the learned potential is off by {error:.2%} (root mean square) at "
        f"{len(place):,} new points; as many directions "
        f"bend down as should at {same:.1%} of them."
    )
    return Findings(headline, numbers)


def _draw(outcome: Outcome, laplacian: torch.Tensor, expected: torch.Tensor) -> None:
    """The Laplacian by calculus, the learned one, and their difference, as maps."""
    figure = Figure(figsize=(11.4, 4.5), facecolor="white")
    panels: Any = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.05, right=0.95, top=0.77, bottom=0.09, wspace=0.25)
    place, most, gap = (
        outcome.dataset["point"],
        float(expected.abs().quantile(0.98)),
        laplacian - expected,
    )
    for axes, values, limit, title in zip(
        panels,
        (expected, laplacian, gap),
        (most, most, float(gap.abs().quantile(0.98))),
        ("by calculus", "learned from energies and forces", "difference"),
        strict=True,
    ):
        drawn = axes.scatter(
            place[:, 0].numpy(),
            place[:, 1].numpy(),
            c=values.numpy(),
            s=5,
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            linewidths=0,
        )
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.tick_params(colors=FAINT, labelsize=8)
        for spine in axes.spines.values():
            spine.set(color="#d5d8df")
        figure.colorbar(drawn, ax=axes, fraction=0.045, pad=0.02).ax.tick_params(
            labelsize=8, colors=FAINT
        )
    figure.text(
        0.05,
        0.955,
        "Laplacian of Mueller and Brown's potential",
        fontsize=13,
        color=INK,
        weight="bold",
        va="top",
    )
    note = (
        "red: bends up, a valley; blue: bends down; trace of the Hessian of a network, "
        "for all points in one mapped call"
    )
    figure.text(0.05, 0.885, note, fontsize=9, color=FAINT, va="top")
    figure.savefig(outcome.folder / "laplacian.png", dpi=150)
