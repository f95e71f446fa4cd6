"""Random numbers that depend only on the seed, the recorded call and the sample's index.

A counter-based generator (Philox, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3") gives every sample whole blocks of its own. So a chunk takes one jump and one fill, and the same
sample draws the same numbers under any chunk size, number of devices and order of work. All numbers
are drawn on the host, by numpy: one stream for all kinds of devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

_WORDS_PER_BLOCK = 4
"""Number of 64-bit words that Philox makes from one count."""

_SHORTS_PER_BLOCK = 4 * _WORDS_PER_BLOCK
"""Numbers of 16 bits that Philox makes from one count."""

_CACHED = 2**16
"""Elements that are decided at a time: their words stay in the processor's cache."""

_COARSE_BITS = {torch.float16: 11, torch.bfloat16: 8}
"""Bits of a uniform draw in the small floating-point types: more could round up to 1."""


class TorchDraws(NamedTuple):
    """Placeholder for a seed: torch's own operators draw, visible to the maps around the call."""

    generator: torch.Generator | None
    """The user's generator, or None for torch's own."""


Seeds = tuple[int | TorchDraws, ...]
"""Seeds of the draws of a mapped call: first for torch's own generator, then for each of the
user's."""


SampleNumbers = int | np.ndarray
"""The number of the first of some samples that are one behind the other, or all their numbers,
ascending."""


def number_of(start: SampleNumbers, i: int) -> int:
    """The number of the sample at place `i`."""
    return start + i if isinstance(start, int) else int(start[i])


def numbers_at(start: SampleNumbers, places: np.ndarray) -> np.ndarray:
    """The numbers of the samples at these places."""
    return start + places if isinstance(start, int) else start[places]


def counted(seeds: Seeds) -> Seeds:
    """Seeds that never draw from torch's generators: for trials, which leave no trace."""
    return tuple([0 if isinstance(seed, TorchDraws) else seed for seed in seeds])


class Stream(NamedTuple):
    """The numbers of one recorded call, for consecutive samples."""

    size: int
    """Number of samples."""
    start: SampleNumbers
    """Index of the first sample, or the indices of all."""
    seed: int
    """Seed of the mapped call."""
    number: int
    """Number of the recorded call."""

    def uniform(self, count: int, single: bool = False) -> np.ndarray:
        """Uniform numbers in [0, 1), `[size, count]`.

        Single precision is twice as fast: a word makes two numbers.
        """
        if not isinstance(self.start, int):
            return self._apart(lambda run: run.uniform(count, single))
        per_block = _WORDS_PER_BLOCK * (2 if single else 1)
        blocks = -(-count // per_block)
        # Samples of other paths may draw more or less in a call of this number: by the key their
        # blocks are never these.
        key = (((blocks << 32) | self.number) << 64) | self.seed
        stream = np.random.Generator(np.random.Philox(key=key, counter=self.start * blocks))
        drawn = stream.random(
            (self.size, blocks * per_block), dtype=np.float32 if single else np.float64
        )
        return np.ascontiguousarray(drawn[:, :count])

    def below(self, count: int, p: float) -> np.ndarray:
        """True with probability `p`, else False, `[size, count]`.

        A bit generator's word decides four elements, by 16 bits each: at most one of 65,536
        elements falls on the threshold itself, and a number of its own decides that one.
        """
        if not isinstance(self.start, int):
            return self._apart(lambda run: run.below(count, p))
        level, share = divmod(p * 2**16, 1.0)
        out = np.empty((self.size, count), dtype=np.bool_)
        if level >= 2**16:
            out.fill(True)
            return out
        blocks = -(-count // _SHORTS_PER_BLOCK)
        if blocks * _SHORTS_PER_BLOCK == count:  # rows follow on each other without a gap
            rows, each = out.reshape(-1, _SHORTS_PER_BLOCK), 1
        else:
            rows, each = out, blocks
        self._decide(rows, self.start * blocks, each, np.uint16(level), share)
        return out

    def _decide(
        self, rows: np.ndarray, first: int, blocks: int, threshold: np.uint16, share: float
    ) -> None:
        """Fill rows whose numbers start at count `first`, `blocks` counts for each row."""
        stream = np.random.Philox(key=(self.number << 64) | self.seed, counter=first)
        width = rows.shape[1]
        step = max(1, _CACHED // (blocks * _SHORTS_PER_BLOCK))
        ties = []
        for at in range(0, len(rows), step):
            part = rows[at : at + step]
            words = stream.random_raw(len(part) * blocks * _WORDS_PER_BLOCK)
            shorts = words.astype("<u8", copy=False).view("<u2")
            drawn = shorts.reshape(len(part), -1)[:, :width]
            np.less(drawn, threshold, out=part)
            if share:
                ties.append(np.flatnonzero(drawn == threshold) + at * width)
        if ties:
            row, column = np.divmod(np.concatenate(ties), width)
            places = (first + row * blocks) * _SHORTS_PER_BLOCK + column
            rows[row, column] = self._one_of_many(places) < share

    def _one_of_many(self, places: np.ndarray) -> np.ndarray:
        """A uniform number for each place: by the mixing function of `sample_seed`."""
        state = np.full(places.shape, sample_seed(self.seed, self.number, 0), dtype=np.uint64)
        state += np.uint64(0x9E3779B97F4A7C15) * (places.astype(np.uint64) + np.uint64(1))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53

    def _apart(self, draw: Callable[[Stream], np.ndarray]) -> np.ndarray:
        """The numbers of samples that are apart: those of all between them, and out of these."""
        numbers = np.asarray(self.start)
        first = int(numbers[0]) if len(numbers) else 0
        last = int(numbers[-1]) if len(numbers) else -1
        return draw(self._replace(size=last + 1 - first, start=first))[numbers - first]

    def normal(self, count: int) -> np.ndarray:
        """Standard normal numbers, `[size, count]`, by the method of Box and Muller.

        It takes a fixed number of words for each, unlike rejection.
        """
        half = -(-count // 2)
        uniform = self.uniform(2 * half)
        radius = np.sqrt(-2.0 * np.log1p(-np.ascontiguousarray(uniform[:, :half])))
        angle = (2.0 * math.pi) * np.ascontiguousarray(uniform[:, half:])
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :count]

    def signs(self, count: int) -> np.ndarray:
        """+1 and -1 with equal chance, `[size, count]` of 8-bit integers, from one bit each."""
        if not isinstance(self.start, int):
            return self._apart(lambda run: run.signs(count))
        blocks = -(-count // (64 * _WORDS_PER_BLOCK))
        bits = np.random.Philox(key=(self.number << 64) | self.seed, counter=self.start * blocks)
        words = (
            bits.random_raw(self.size * blocks * _WORDS_PER_BLOCK)
            .astype("<u8")
            .view(np.uint8)
            .reshape(self.size, -1)
        )
        return np.unpackbits(words, axis=1, count=count, bitorder="little").view(np.int8) * np.int8(
            2
        ) - np.int8(1)


Draw = Callable[..., torch.Tensor]
"""Type of the draws, `draw(stream, shape, dtype, device, *parameters)`: `[size, *shape]`."""


def _tensor(
    values: np.ndarray, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return (
        torch.from_numpy(np.ascontiguousarray(values))
        .to(dtype)
        .reshape(len(values), *shape)
        .to(device)
    )


def uniform(
    stream: Stream,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    low: float,
    high: float,
) -> torch.Tensor:
    """Uniform numbers in [low, high)."""
    if dtype.is_complex:
        parts = uniform(stream, [*shape, 2], dtype.to_real(), device, low, high)
        return torch.view_as_complex(parts)
    values = stream.uniform(math.prod(shape), single=dtype != torch.float64)
    if dtype in _COARSE_BITS:
        steps = np.float32(2 ** _COARSE_BITS[dtype])
        values = np.floor(values * steps) / steps
    if (low, high) != (0.0, 1.0):
        values = values * values.dtype.type(high - low) + values.dtype.type(low)
    return _tensor(values, shape, dtype, device)


def normal(
    stream: Stream,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    mean: float,
    std: float,
) -> torch.Tensor:
    """Normal numbers; a complex one has half of the variance in each part."""
    if dtype.is_complex:
        parts = normal(stream, [*shape, 2], dtype.to_real(), device, 0.0, std * math.sqrt(0.5))
        return torch.view_as_complex(parts) + mean
    return _tensor(stream.normal(math.prod(shape)) * std + mean, shape, dtype, device)


def log_normal(
    stream: Stream,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    mean: float,
    std: float,
) -> torch.Tensor:
    """Exponentials of normal numbers."""
    return _tensor(np.exp(stream.normal(math.prod(shape)) * std + mean), shape, dtype, device)


def bernoulli(
    stream: Stream, shape: list[int], dtype: torch.dtype, device: torch.device, p: float
) -> torch.Tensor:
    """Ones with probability `p`, else zeros."""
    return _tensor(stream.below(math.prod(shape), p), shape, dtype, device)


def integers(
    stream: Stream, shape: list[int], dtype: torch.dtype, device: torch.device, low: int, high: int
) -> torch.Tensor:
    """Integers in [low, high), for a range below 2**48.

    A 53-bit number favours none of them by more than 2**-5 of a chance.
    """
    values = np.floor(stream.uniform(math.prod(shape)) * (high - low)).astype(np.int64) + low
    return _tensor(values, shape, dtype, device)


def permutation(
    stream: Stream, shape: list[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A permutation of 0 to n - 1: the order of n uniform numbers."""
    values = np.argsort(stream.uniform(math.prod(shape)), axis=1, kind="stable")
    return _tensor(values, shape, dtype, device)


def exponential(
    stream: Stream, shape: list[int], dtype: torch.dtype, device: torch.device, rate: float
) -> torch.Tensor:
    """Exponential numbers above zero, as a Gumbel draw takes their logarithm."""
    values = -np.log1p(-stream.uniform(math.prod(shape))) / rate
    return _tensor(np.maximum(values, torch.finfo(dtype).tiny), shape, dtype, device)


def cauchy(
    stream: Stream,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    median: float,
    sigma: float,
) -> torch.Tensor:
    """Cauchy numbers, by the inverse of their distribution."""
    values = np.tan(math.pi * (stream.uniform(math.prod(shape)) - 0.5))
    return _tensor(median + sigma * values, shape, dtype, device)


def geometric(
    stream: Stream, shape: list[int], dtype: torch.dtype, device: torch.device, p: float
) -> torch.Tensor:
    """Numbers of trials up to the first success: 1, 2, ..."""
    values = np.log1p(-stream.uniform(math.prod(shape))) / math.log1p(-p)
    return _tensor(np.floor(values) + 1, shape, dtype, device)


def sample_seed(seed: int, number: int, sample: int) -> int:
    """A 63-bit seed for one call of one sample.

    By the mixing function of SplitMix64 (Steele et al. 2014).
    """
    mask = (1 << 64) - 1
    state = seed
    for part in (number, sample):
        state = (state + 0x9E3779B97F4A7C15 * (part + 1)) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
