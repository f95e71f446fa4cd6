"""Report on a flow: its Lyapunov exponents, from the Jacobians along trajectories."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from shardmap.errors import ConfigError
from shardmap.jobs import Bounds, Findings, Outcome, save_tensors
from shardmap.jobs.report import FAINT, INK, write_csv

GROWS, SHRINKS = "#c8321f", "#2a6fb0"


def lyapunov(
    outcome: Outcome,
    *,
    interval: Annotated[float, Bounds(above=0)] = 0.2,
    discarded: Annotated[int, Bounds(least=0)] = 100,
) -> Findings:
    """Find the Lyapunov exponents of a flow by QR (Benettin et al. 1980).

    They say how fast small differences grow in each direction.

    Args:
        outcome: Columns `state` and `trajectory`, each trajectory's states in order; outputs the
            Jacobian of the flow, [N, n, n].
        interval: Time units that the flow takes from one state to the next.
        discarded: Intervals at the beginning of each trajectory in which the directions turn to
            their places.

    Returns:
        The largest exponent, how many are positive, and the dimension of the attractor by Kaplan
        and Yorke.

    Raises:
        ConfigError: A trajectory is shorter than what is discarded, or there are no Jacobians of
            single samples.
    """
    (jacobians,) = outcome.rows()
    count = int(outcome.dataset["trajectory"].max()) + 1
    along = jacobians.unflatten(0, (count, -1))  # [trajectories, intervals, n, n]
    kept = along.shape[1] - discarded
    if kept < 1:
        raise ConfigError(
            f"report.discarded: {discarded} of the {along.shape[1]} intervals of a trajectory "
            "leave none; give fewer"
        )
    frame = torch.eye(along.shape[2], dtype=along.dtype).expand(count, -1, -1)
    grown = torch.zeros(count, along.shape[2], dtype=along.dtype)
    for number in range(along.shape[1]):
        frame, r = torch.linalg.qr(along[:, number] @ frame)
        if number >= discarded:
            grown += r.diagonal(dim1=1, dim2=2).abs().log()
    each = grown / (kept * interval)  # [trajectories, n]
    spectrum, order = each.mean(0).sort(descending=True)
    error = each.std(0)[order] / count**0.5 if count > 1 else torch.zeros_like(spectrum)
    dimension = kaplan_yorke(spectrum)
    # One exponent is zero, that of a difference along the trajectory; counted is what is above its
    # error.
    positive = int((spectrum > torch.maximum(2 * error, torch.full_like(error, 0.01))).sum())
    save_tensors(
        outcome.folder / "exponents.safetensors", {"exponents": spectrum, "standard_errors": error}
    )
    write_csv(
        outcome.folder / "exponents.csv",
        {
            "exponent": [round(v, 6) for v in spectrum.tolist()],
            "standard_error": [round(v, 6) for v in error.tolist()],
        },
    )
    _draw(outcome, spectrum, error, dimension)
    numbers = {
        "largest_exponent": round(float(spectrum[0]), 5),
        "standard_error": round(float(error[0]), 5),
        "positive_exponents": positive,
        "sum_of_exponents": round(float(spectrum.sum()), 5),
        "kaplan_yorke_dimension": round(dimension, 4),
        "time_units": round(count * kept * interval, 3),
    }
    headline = (
        f"Largest Lyapunov exponent {float(spectrum[0]):.3f} +- {float(error[0]):.3f} per time "
        "unit: small differences double in "
        f"{math.log(2) / float(spectrum[0]):.2f}.\n{positive} of {len(spectrum)} exponents are "
        "positive, and the attractor has dimension "
        f"{dimension:.2f} (Kaplan-Yorke); {count * kept * interval:,.0f} time units on {count} "
        "trajectories."
    )
    return Findings(headline, numbers)


def kaplan_yorke(spectrum: Tensor) -> float:
    """The Kaplan-Yorke dimension: the interpolated number of largest exponents that sum to zero.

    It is the number of all exponents if their sum is not negative.

    Args:
        spectrum: [n], the largest first.
    """
    sums = spectrum.cumsum(0)
    whole = int((sums >= 0).cumprod(0).sum())
    if whole == 0 or whole == len(spectrum):
        return float(whole)
    return whole + float(sums[whole - 1] / spectrum[whole].abs())


def _draw(outcome: Outcome, spectrum: Tensor, error: Tensor, dimension: float) -> None:
    """The exponents as bars, and their running sum."""
    figure = Figure(figsize=(9.6, 4.8), facecolor="white")
    axes: Any = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.92, top=0.84, bottom=0.11)
    numbers, sums = range(1, len(spectrum) + 1), spectrum.cumsum(0)
    colors = [GROWS if v > 0 else SHRINKS for v in spectrum.tolist()]
    axes.bar(numbers, spectrum.numpy(), color=colors, width=0.72, yerr=error.numpy())
    axes.axhline(0, color=INK, linewidth=0.8)
    right = axes.twinx()
    right.plot(numbers, sums.numpy(), color=INK, linewidth=1.6)
    right.axvline(dimension, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    right.text(
        dimension,
        0.93,
        f" dimension {dimension:.1f}",
        color=INK,
        fontsize=9,
        transform=right.get_xaxis_transform(),
    )
    for side, values, text in (
        (axes, spectrum, "growth per time unit (bars)"),
        (right, sums, "sum so far (line)"),
    ):
        most = 1.15 * float(values.abs().max())
        side.set(ylim=(-most, most))  # both zeros at one height
        side.set_ylabel(text, color=INK)
    axes.set(xlabel="exponent", xlim=(0, len(spectrum) + 1))
    figure.text(0.08, 0.94, "Lyapunov exponents", fontsize=13, color=INK, weight="bold", va="top")
    figure.savefig(outcome.folder / "exponents.png", dpi=150)
