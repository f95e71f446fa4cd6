"""All 40 Lyapunov exponents of the Lorenz-96 model of weather, from the Jacobians of its flow.

Lorenz's 1996 model of the weather along a circle of latitude, 40 places that each blow on the next,

    dx_i/dt = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + 8,

is chaotic: two states that differ by a hair grow apart. The Lyapunov exponents are the rates at
which small differences grow or shrink, one for each direction. Here several trajectories run side
by side. The Jacobian of the flow over 0.2 time units, taken at each of them in one call, carries an
orthonormal frame along, and a QR decomposition says by how much the frame has grown (Benettin et
al. 1980).

Lorenz and Emanuel (1998) count 13 positive exponents, errors that double in 0.42 time units, and a
dimension of 27.1.

    python examples/lyapunov.py
    python examples/lyapunov.py --trajectories 8 --units 20
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import shardmap

INK, FAINT, GROWS, SHRINKS = "#1f2430", "#8a90a0", "#c8321f", "#2a6fb0"
PLACES, FORCING = 40, 8.0
STEP = 0.05
"""Time units of a Runge-Kutta step; a unit is about five days of weather."""
STEPS = 4
"""Runge-Kutta steps between two QR decompositions."""
ZERO = 0.01
"""Rates below this count as zero: one is zero, that of a difference along the trajectory itself."""


def wind(x: Tensor) -> Tensor:
    """dx/dt, of one state [40] or of many [..., 40]."""
    return (x.roll(-1, -1) - x.roll(2, -1)) * x.roll(1, -1) - x + FORCING


def flow(x: Tensor) -> Tensor:
    """The state after `STEPS` steps of the fourth-order Runge-Kutta method."""
    for _ in range(STEPS):
        a = wind(x)
        b = wind(x + STEP / 2 * a)
        c = wind(x + STEP / 2 * b)
        d = wind(x + STEP * c)
        x = x + STEP / 6 * (a + 2 * b + 2 * c + d)
    return x


def exponents(trajectories: int, units: float, discarded: float = 20.0) -> Tensor:
    """Growth rates of the frame along each trajectory, [trajectories, 40], per time unit, unsorted.

    Args:
        trajectories: How many, from random states near rest.
        units: Time units that are averaged over.
        discarded: Time units before that: twice as many for the states to reach the attractor, then
            for the frames to turn to their places.
    """
    jacobians = shardmap.jacfwd(flow, trace="once")
    x = FORCING + torch.randn(trajectories, PLACES, dtype=torch.float64)
    frame = torch.eye(PLACES, dtype=torch.float64).expand(trajectories, PLACES, PLACES)
    grown = torch.zeros(trajectories, PLACES, dtype=torch.float64)
    window = STEP * STEPS
    for _ in range(round(2 * discarded / window)):
        x = flow(x)
    for interval in range(round((discarded + units) / window)):
        frame, r = torch.linalg.qr(jacobians(x) @ frame)  # [trajectories, 40, 40] each
        x = flow(x)
        if interval >= round(discarded / window):
            grown += r.diagonal(dim1=1, dim2=2).abs().log()
    return grown / (window * round(units / window))


def kaplan_yorke(spectrum: Tensor) -> float:
    """The dimension of the attractor by Kaplan and Yorke.

    How many exponents, largest first, sum to zero; interpolated.
    """
    sums = spectrum.cumsum(0)
    whole = int((sums >= 0).sum())
    return whole + float(sums[whole - 1] / spectrum[whole].abs())


def draw(spectrum: Tensor, spread: Tensor, path: Path) -> None:
    """The exponents as bars, and their running sum."""
    figure = Figure(figsize=(9.6, 5.0), facecolor="white")
    axes: Any = figure.subplots()
    figure.subplots_adjust(left=0.07, right=0.93, top=0.80, bottom=0.11)
    numbers, dimension = range(1, PLACES + 1), kaplan_yorke(spectrum)
    colors = [GROWS if value > ZERO else SHRINKS for value in spectrum.tolist()]
    axes.bar(
        numbers,
        spectrum.numpy(),
        color=colors,
        width=0.72,
        yerr=spread.numpy(),
        error_kw={"ecolor": INK, "elinewidth": 0.8},
    )
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="exponent", xlim=(0, PLACES + 1), ylim=(-5.6, 5.6))
    axes.set_ylabel("growth per time unit (bars)", color=INK)
    right = axes.twinx()
    right.plot(numbers, spectrum.cumsum(0).numpy(), color=INK, linewidth=1.6)
    right.set(ylim=(-44.8, 44.8))
    right.set_ylabel("sum of the exponents so far (line)", color=INK)
    right.axvline(dimension, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    right.text(
        dimension + 0.4,
        24,
        f"the sum is zero here:\nKaplan-Yorke dimension {dimension:.1f}",
        fontsize=9,
        color=INK,
        va="center",
    )
    axes.annotate(
        f"{float(spectrum[0]):.2f}: errors double in {0.6931 / float(spectrum[0]):.2f} "
        "units,\nabout two days of weather",
        (1.4, float(spectrum[0])),
        (3.2, 3.4),
        fontsize=9,
        color=INK,
        arrowprops={"arrowstyle": "-", "color": FAINT},
    )
    for side in (axes, right):
        side.tick_params(colors=INK, labelsize=8.5)
        for spine in side.spines.values():
            spine.set(color="#d5d8df")
    figure.text(
        0.07,
        0.955,
        "Lorenz-96: in how many directions do small errors grow?",
        fontsize=13,
        color=INK,
        weight="bold",
        va="top",
    )
    count = int((spectrum > ZERO).sum())
    note = (
        f"{count} of 40 Lyapunov exponents are positive (red); "
        "from batch Jacobians of the flow along its trajectories, forcing 8"
    )
    figure.text(0.07, 0.885, note, fontsize=9, color=FAINT, va="top")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run, draw, and say how chaotic it is."""
    parser = argparse.ArgumentParser(description="Lyapunov exponents of the Lorenz-96 model.")
    parser.add_argument("--trajectories", type=int, default=32)
    parser.add_argument(
        "--units", type=float, default=80, help="time units that each trajectory is averaged over"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("lyapunov.png"))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    each = exponents(options.trajectories, options.units)
    spectrum = each.mean(0).sort(descending=True).values
    error = each.std(0) / len(each) ** 0.5  # of the mean over trajectories
    draw(spectrum, error, options.picture)
    total = float(spectrum.sum())
    print(
        f"{len(each)} trajectories of {options.units:g} time units; all exponents sum to "
        f"{total:.3f}, of the exact flow to -40"
    )
    print(
        f"Largest Lyapunov exponent {float(spectrum[0]):.3f} +- {float(error[0]):.3f}, "
        f"{int((spectrum > ZERO).sum())} positive, "
        f"Kaplan-Yorke dimension {kaplan_yorke(spectrum):.2f}. Picture: {options.picture}"
    )


if __name__ == "__main__":
    main()
