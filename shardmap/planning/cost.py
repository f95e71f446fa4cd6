"""Predicted time of a chunk: a guess from operations and bytes, then from measured chunks.

No calibration: the guess only orders devices, operators and chunk sizes before anything has run.
From the first chunk on, the seconds that it took count, and chunks are handed out as devices become
free, so that a wrong guess costs only balance in the first moments.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from shardmap.planning import device as devices
from shardmap.planning.memory import MemoryModel
from shardmap.planning.observe import Observation


@dataclass(frozen=True, slots=True)
class Machine:
    """Rough speed of a kind of device."""

    flops: float
    """Floating-point operations per second, in kernels of everyday size."""
    bandwidth: float
    """Bytes per second from memory."""
    launch_seconds: float
    """Seconds per call, spent by the host."""
    chunk_seconds: float
    """Seconds per chunk, spent by the host outside of calls."""


def machine(device_type: str) -> Machine:
    """A typical device of that kind.

    A core of a server CPU times the threads in use, or a data-centre GPU.
    """
    if device_type == "cpu":
        threads = torch.get_num_threads()
        return Machine(8e10 * threads, 8e9 * min(threads, 8), LAUNCH_SECONDS, 1e-4)
    return Machine(2e13, 1e12, 6e-6, 1e-4)


LAUNCH_SECONDS = 8e-6
"""Seconds of a kernel on CPU beside its arithmetic and traffic: dispatch, allocation, waking the
threads. Fitted to chunks of 2 to 64 samples of a GPT-2 of 427 kernels, a BERT of 290, a small
transformer of 170 and two CNNs of 34 and 70: 8 to 30 us."""
GRAIN = 1 << 15
"""Elements of a result for which torch takes another thread (`at::internal::GRAIN_SIZE`)."""
CACHED = 1.4
"""Bandwidth of intermediates that stay in cache, over that of memory."""


def sample_seconds(observation: Observation, device_type: str) -> float:
    """A guess of the seconds for one sample inside a large chunk.

    Each operator is bound by arithmetic or by memory.
    """
    m = machine(device_type)
    return max(sum(max(c.flops / m.flops, c.bytes / m.bandwidth) for c in observation.costs), 1e-10)


def host_seconds(observation: Observation, device_type: str) -> float:
    """A guess of the seconds that a chunk costs whatever its size.

    These are the host's work around its kernels, and the weights that they read anew.
    """
    m = machine(device_type)
    read = sum(c.fixed_bytes for c in observation.costs)
    return m.chunk_seconds + m.launch_seconds * observation.calls + read / m.bandwidth


def cached_bytes(sharing: int) -> int:
    """A process's part of the CPU's cache: half of the last level, at most 32 MiB."""
    return min(devices.cache_bytes() // (2 * sharing), 32 << 20)


def cpu_chunk_seconds(
    observation: Observation, memory: MemoryModel, sizes: tuple[int, ...], sharing: int
) -> np.ndarray:
    """A guess of the seconds of a chunk on the CPU, for each of some numbers of samples.

    Each kernel takes its launch, and the longer of its arithmetic and its traffic: what it reads of
    every sample, and the weights that it reads whatever the size. A small result occupies few
    threads. Intermediates that outgrow the cache are read at the speed of memory.
    """
    m, threads = machine("cpu"), torch.get_num_threads()
    flops, traffic, fixed, elements = _kernels(observation)
    samples = np.asarray(sizes, dtype=np.float64)[:, None]  # [sizes, 1] against [kernels]
    working = np.asarray([memory.chunk_bytes(size) for size in sizes], dtype=np.float64)[:, None]
    missed = np.clip(1 - cached_bytes(sharing) / np.maximum(working, 1), 0, 1)
    busy = np.clip(samples * elements / GRAIN, 1, threads) / threads
    moved = samples * traffic * (missed + (1 - missed) / CACHED) + fixed
    each = np.maximum(samples * flops / m.flops, moved / m.bandwidth) / busy
    return m.chunk_seconds + m.launch_seconds * len(flops) + each.sum(1)


@functools.lru_cache(maxsize=256)
def _kernels(observation: Observation) -> tuple[np.ndarray, ...]:
    """Operations, bytes, fixed bytes and elements of each kernel."""
    rows = np.asarray(observation.kernels, dtype=np.float64).reshape(-1, 4)
    return tuple(rows.T)
