"""The draws of `shardmap.rules.philox`, made by torch's own `rand` and `randn`.

A map inside another map, or inside `torch.func.vmap`, draws so: the outer map sees the
operators, and gives each of its own samples the draws of its own randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from shardmap.rules import philox

Generator = torch.Generator | None


def drawn(
    function: philox.Draw, size: int, generator: Generator, shape: Sequence[int], *rest: object
) -> torch.Tensor:
    """Draw a tensor `[size, *shape]` with the distribution of `function`.

    Args:
        function: One of the draws of `shardmap.rules.philox`.
        size: Number of samples.
        generator: The user's generator, or None for torch's own.
        shape: Shape of one sample's draw.
        *rest: Dtype, device and the parameters of the distribution.
    """
    return _DRAWS[function](generator, [size, *shape], *rest)


def _uniform(
    generator: Generator,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    low: float,
    high: float,
) -> torch.Tensor:
    values = torch.rand(shape, generator=generator, dtype=dtype, device=device)
    return values if (low, high) == (0.0, 1.0) else values * (high - low) + low


def _normal(
    generator: Generator,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    mean: float,
    std: float,
) -> torch.Tensor:
    values = torch.randn(shape, generator=generator, dtype=dtype, device=device)
    return values if (mean, std) == (0.0, 1.0) else values * std + mean


def _fine(generator: Generator, shape: list[int], device: torch.device) -> torch.Tensor:
    """Uniform numbers of 53 bits, from which the other distributions are computed."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)


def _log_normal(
    generator: Generator,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    mean: float,
    std: float,
) -> torch.Tensor:
    return _normal(generator, shape, torch.float64, device, mean, std).exp().to(dtype)


def _bernoulli(
    generator: Generator, shape: list[int], dtype: torch.dtype, device: torch.device, p: float
) -> torch.Tensor:
    return (_fine(generator, shape, device) < p).to(dtype)


def _integers(
    generator: Generator,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    low: int,
    high: int,
) -> torch.Tensor:
    values = (_fine(generator, shape, device) * (high - low)).floor().to(torch.int64)
    return (values + low).to(dtype)


def _permutation(
    generator: Generator, shape: list[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return _fine(generator, shape, device).argsort(dim=1, stable=True).to(dtype)


def _exponential(
    generator: Generator, shape: list[int], dtype: torch.dtype, device: torch.device, rate: float
) -> torch.Tensor:
    values = (-_fine(generator, shape, device)).log1p() / -rate
    return values.clamp_min(torch.finfo(dtype).tiny).to(dtype)


def _cauchy(
    generator: Generator,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    median: float,
    sigma: float,
) -> torch.Tensor:
    angle = (_fine(generator, shape, device) - 0.5) * math.pi
    return (angle.tan() * sigma + median).to(dtype)


def _geometric(
    generator: Generator, shape: list[int], dtype: torch.dtype, device: torch.device, p: float
) -> torch.Tensor:
    trials = (-_fine(generator, shape, device)).log1p() / math.log1p(-p)
    return (trials.floor() + 1).to(dtype)


_DRAWS: dict[philox.Draw, Callable[..., torch.Tensor]] = {
    philox.uniform: _uniform,
    philox.normal: _normal,
    philox.log_normal: _log_normal,
    philox.bernoulli: _bernoulli,
    philox.integers: _integers,
    philox.permutation: _permutation,
    philox.exponential: _exponential,
    philox.cauchy: _cauchy,
    philox.geometric: _geometric,
}
