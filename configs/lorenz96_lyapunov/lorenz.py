"""Lorenz's model of weather along a circle of latitude (Lorenz 1996), a chaotic flow."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from shardmap.jobs import Bounds, Dataset


def flow(
    state: Tensor,
    *,
    steps: Annotated[int, Bounds(least=1)] = 4,
    step: Annotated[float, Bounds(above=0)] = 0.05,
    forcing: float = 8.0,
) -> Tensor:
    """The state some time later, by the fourth-order Runge-Kutta method.

    Args:
        state: [places], or [..., places] for many.
        steps: Runge-Kutta steps.
        step: Time units of each; a unit is about five days of weather.
        forcing: F of dx_i/dt = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + F; chaotic from about 5.

    Returns:
        As `state`.
    """

    def wind(x: Tensor) -> Tensor:
        return (x.roll(-1, -1) - x.roll(2, -1)) * x.roll(1, -1) - x + forcing

    for _ in range(steps):
        a = wind(state)
        b = wind(state + step / 2 * a)
        c = wind(state + step / 2 * b)
        d = wind(state + step * c)
        state = state + step / 6 * (a + 2 * b + 2 * c + d)
    return state


def trajectories(
    *,
    count: Annotated[int, Bounds(least=1)] = 8,
    intervals: Annotated[int, Bounds(least=1)] = 600,
    approach: Annotated[int, Bounds(least=0)] = 200,
    places: Annotated[int, Bounds(least=4)] = 40,
    steps: Annotated[int, Bounds(least=1)] = 4,
    step: Annotated[float, Bounds(above=0)] = 0.05,
    forcing: float = 8.0,
) -> Dataset:
    """States along several trajectories from random beginnings.

    Args:
        count: How many trajectories.
        intervals: States on each; the flow leads from each to the next.
        approach: Intervals before the first state, for the trajectory to reach the attractor.
        places: Places on the circle.
        steps: As for `flow`; what an interval is.
        step: As for `flow`.
        forcing: As for `flow`.

    Returns:
        Columns `state` ([count * intervals, places], float64, one trajectory behind the other) and
        `trajectory`.
    """
    x = forcing + torch.randn(count, places, dtype=torch.float64)
    states = torch.empty(count, intervals, places, dtype=torch.float64)
    for interval in range(-approach, intervals):
        if interval >= 0:
            states[:, interval] = x
        x = flow(x, steps=steps, step=step, forcing=forcing)
    return Dataset(
        {
            "state": states.flatten(0, 1),
            "trajectory": torch.arange(count).repeat_interleave(intervals),
        }
    )
