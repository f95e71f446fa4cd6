"""Random numbers that depend on the seed, the recorded call and the sample's index, and on nothing else.

A counter-based generator (Philox, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") gives every sample whole
blocks of its own. So a chunk is one jump and one fill, and the same sample draws the same numbers under any chunk size, number
of devices and order of work. Everything is drawn on the host, by numpy: one stream for all kinds of devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

_WORDS_PER_BLOCK = 4
"""64-bit words that Philox makes from one count."""

_COARSE_BITS = {torch.float16: 11, torch.bfloat16: 8}
"""Bits of a uniform draw in the small floating point types: more would round up to 1."""


def uniform(size: int, start: int, seed: int, number: int, count: int, single: bool = False) -> np.ndarray:
    """Uniform numbers in [0, 1), `[size, count]`.

    Args:
        size: How many samples.
        start: Index of the first.
        seed: Seed of the mapped call.
        number: Number of the recorded call.
        count: Numbers for each sample.
        single: In single precision, twice as fast: two numbers from one word.
    """
    per_block = _WORDS_PER_BLOCK * (2 if single else 1)
    blocks = -(-count // per_block)
    stream = np.random.Generator(np.random.Philox(key=(number << 64) | seed, counter=start * blocks))
    drawn = stream.random((size, blocks * per_block), dtype=np.float32 if single else np.float64)
    return drawn[:, :count]


def normal(size: int, start: int, seed: int, number: int, count: int) -> np.ndarray:
    """Standard normal numbers, `[size, count]`, by Box and Muller: a fixed number of words each, which rejection has not."""
    half = -(-count // 2)
    first, second = np.split(np.ascontiguousarray(uniform(size, start, seed, number, 2 * half)), 2, axis=1)
    radius = np.sqrt(-2.0 * np.log1p(-np.ascontiguousarray(first)))
    angle = (2.0 * math.pi) * np.ascontiguousarray(second)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :count]


Draw = Callable[..., torch.Tensor]
"""`draw(size, start, seed, number, shape, dtype, device, *parameters)`: a tensor `[size, *shape]`."""


def _tensor(values: np.ndarray, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).reshape(len(values), *shape).to(device)


def draw_uniform(size: int, start: int, seed: int, number: int, shape: list[int], dtype: torch.dtype, device: torch.device, low: float, high: float):
    """Uniform in [low, high)."""
    if dtype.is_complex:
        parts = draw_uniform(size, start, seed, number, [*shape, 2], dtype.to_real(), device, low, high)
        return torch.view_as_complex(parts)
    values = uniform(size, start, seed, number, math.prod(shape), single=dtype != torch.float64)
    if dtype in _COARSE_BITS:
        steps = np.float32(2 ** _COARSE_BITS[dtype])
        values = np.floor(values * steps) / steps
    if (low, high) != (0.0, 1.0):
        values = values * values.dtype.type(high - low) + values.dtype.type(low)
    return _tensor(values, shape, dtype, device)


def draw_normal(size: int, start: int, seed: int, number: int, shape: list[int], dtype: torch.dtype, device: torch.device, mean: float, std: float):
    """Normal; a complex number has half of the variance in each part."""
    if dtype.is_complex:
        parts = draw_normal(size, start, seed, number, [*shape, 2], dtype.to_real(), device, 0.0, std * math.sqrt(0.5))
        return torch.view_as_complex(parts) + mean
    return _tensor(normal(size, start, seed, number, math.prod(shape)) * std + mean, shape, dtype, device)


def draw_log_normal(size: int, start: int, seed: int, number: int, shape: list[int], dtype: torch.dtype, device: torch.device, mean: float, std: float):
    """The exponential of a normal number."""
    return _tensor(np.exp(normal(size, start, seed, number, math.prod(shape)) * std + mean), shape, dtype, device)


def draw_bernoulli(size: int, start: int, seed: int, number: int, shape: list[int], dtype: torch.dtype, device: torch.device, p: float):
    """One with probability `p`, else zero."""
    single = 1e-3 <= p <= 1.0 - 1e-3  # near 0 and 1 the 24 bits of single precision would change the probability
    return _tensor(uniform(size, start, seed, number, math.prod(shape), single) < p, shape, dtype, device)


def draw_integers(size: int, start: int, seed: int, number: int, shape: list[int], dtype: torch.dtype, device: torch.device, low: int, high: int):
    """Integers in [low, high), for a range below 2**48: a 53-bit number favours none of them by more than 2**-5 of a chance."""
    values = np.floor(uniform(size, start, seed, number, math.prod(shape)) * (high - low)).astype(np.int64) + low
    return _tensor(values, shape, dtype, device)


def draw_permutation(size: int, start: int, seed: int, number: int, shape: list[int], dtype: torch.dtype, device: torch.device):
    """A permutation of 0 to n - 1: the order of n uniform numbers."""
    values = np.argsort(uniform(size, start, seed, number, math.prod(shape)), axis=1, kind="stable")
    return _tensor(values, shape, dtype, device)


def draw_exponential(size: int, start: int, seed: int, number: int, shape: list[int], dtype: torch.dtype, device: torch.device, rate: float):
    """Exponential, and never zero: its logarithm is what a Gumbel draw takes."""
    values = -np.log1p(-np.ascontiguousarray(uniform(size, start, seed, number, math.prod(shape)))) / rate
    return _tensor(np.maximum(values, torch.finfo(dtype).tiny), shape, dtype, device)


def draw_cauchy(size: int, start: int, seed: int, number: int, shape: list[int], dtype: torch.dtype, device: torch.device, median: float, sigma: float):
    """Cauchy, by the inverse of its distribution."""
    values = np.tan(math.pi * (np.ascontiguousarray(uniform(size, start, seed, number, math.prod(shape))) - 0.5))
    return _tensor(median + sigma * values, shape, dtype, device)


def draw_geometric(size: int, start: int, seed: int, number: int, shape: list[int], dtype: torch.dtype, device: torch.device, p: float):
    """Trials up to the first success: 1, 2, ..."""
    values = np.log1p(-np.ascontiguousarray(uniform(size, start, seed, number, math.prod(shape)))) / math.log1p(-p)
    return _tensor(np.floor(values) + 1, shape, dtype, device)


def sample_seed(seed: int, number: int, sample: int) -> int:
    """A 63-bit seed for one call of one sample, by the mixing function of SplitMix64 (Steele et al. 2014)."""
    mask = (1 << 64) - 1
    state = seed
    for part in (number, sample):
        state = (state + 0x9E3779B97F4A7C15 * (part + 1)) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
