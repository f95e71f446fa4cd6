"""Mueller and Brown's potential, and a network that learns it from energies and forces."""

from __future__ import annotations

import logging
from typing import Annotated

import torch
from torch import Tensor, nn

from shardmap.jobs import Bounds, Dataset

logger = logging.getLogger(__name__)

STRENGTHS = (-2.0, -1.0, -1.7, 0.15)
"""The strengths of the four terms, in units of 100 of Mueller and Brown's."""
BENDS = ((-1.0, 0.0, -10.0), (-1.0, 0.0, -10.0), (-6.5, 11.0, -6.5), (0.7, 0.6, 0.7))
CENTRES = ((1.0, 0.0), (0.0, 0.5), (-0.5, 1.5), (-1.0, 1.0))
LEAST, MOST = (-1.4, -0.3), (1.1, 1.9)
"""The corners of the region that is looked at: three valleys and the passes between them."""
CEILING = 0.0
"""Points of higher energy are left out: walls that nothing climbs."""


def mueller_brown(point: Tensor) -> Tensor:
    """Mueller and Brown's potential (Theor. Chim. Acta 53, 1979), a test for reaction paths.

    Args:
        point: [2], or [..., 2] for many.

    Returns:
        A number, or [...]: sum of A exp(a dx^2 + b dx dy + c dy^2) over four terms, dx and dy from
        the term's centre.
    """
    total = point.new_zeros(point.shape[:-1])
    for strength, (a, b, c), (x, y) in zip(STRENGTHS, BENDS, CENTRES, strict=True):
        dx, dy = point[..., 0] - x, point[..., 1] - y
        total = total + strength * (a * dx * dx + b * dx * dy + c * dy * dy).exp()
    return total


def mueller_brown_hessian(point: Tensor) -> Tensor:
    """The second derivatives of `mueller_brown`, by hand: [..., 2] to [..., 2, 2]."""
    total = point.new_zeros(*point.shape, 2)
    for strength, (a, b, c), (x, y) in zip(STRENGTHS, BENDS, CENTRES, strict=True):
        dx, dy = point[..., 0] - x, point[..., 1] - y
        slope = torch.stack([2 * a * dx + b * dy, b * dx + 2 * c * dy], dim=-1)  # of the exponent
        bend = point.new_tensor([[2 * a, b], [b, 2 * c]])
        height = strength * (a * dx * dx + b * dx * dy + c * dy * dy).exp()
        total = total + height[..., None, None] * (slope.unsqueeze(-1) * slope.unsqueeze(-2) + bend)
    return total


def points(*, count: Annotated[int, Bounds(least=1)] = 4000) -> Dataset:
    """Random points in the valleys of the potential.

    Args:
        count: How many.

    Returns:
        Columns `point` ([N, 2], float64) and `energy` ([N]).
    """
    low, high = torch.tensor(LEAST, dtype=torch.float64), torch.tensor(MOST, dtype=torch.float64)
    found = torch.empty(0, 2, dtype=torch.float64)
    while len(found) < count:
        tried = low + (high - low) * torch.rand(count, 2, dtype=torch.float64)
        found = torch.cat([found, tried[mueller_brown(tried) < CEILING]])
    return Dataset({"point": found[:count], "energy": mueller_brown(found[:count])})


def train(
    dataset: Dataset,
    *,
    width: Annotated[int, Bounds(least=1)] = 48,
    samples: Annotated[int, Bounds(least=1)] = 1000,
    rounds: Annotated[int, Bounds(least=0)] = 400,
) -> nn.Module:
    """Learn the potential from energies and forces at points that the dataset does not hold.

    Plain PyTorch.

    Args:
        dataset: Not looked at: what the network is tried on stays new to it.
        width: Units in each of the two hidden layers.
        samples: Points to learn from.
        rounds: Iterations of L-BFGS.

    Returns:
        The network, in double precision; it takes one point ([2]) or many ([N, 2]) and returns
        energies with a last dimension of 1.
    """
    model = nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    ).double()
    place = points(count=samples)["point"].requires_grad_()
    (slope,) = torch.autograd.grad(mueller_brown(place).sum(), place)
    energy, place = mueller_brown(place).detach(), place.detach().requires_grad_()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=max(1, rounds), history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = model(place).squeeze(-1)
        (bent,) = torch.autograd.grad(found.sum(), place, create_graph=True)
        loss = (found - energy).square().mean() + 0.1 * (bent - slope).square().sum(-1).mean()
        loss.backward()
        return loss

    if rounds:
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]  LBFGS takes a closure that returns a tensor; its stub says float
    with torch.no_grad():
        error = (model(place).squeeze(-1) - energy).square().mean().sqrt()
    logger.info(
        "%d points: energies within %.4f (root mean square), of a spread of %.3f",
        samples,
        float(error),
        float(energy.std()),
    )
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def learned_energy(model: nn.Module, point: Tensor) -> Tensor:
    """The network's energy at one point.

    Args:
        model: Takes one point.
        point: [2].

    Returns:
        A number.
    """
    return model(point).squeeze(-1)
