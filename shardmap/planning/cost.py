"""Predicted time of a chunk: a guess from operations and bytes, then from measured chunks.

No calibration: the guess only orders devices and operators before anything has run. From the first
chunk on, the seconds that it took count, and chunks are handed out as devices become free, so that
a wrong guess costs only balance in the first moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
        return Machine(2.5e10 * threads, 8e9 * min(threads, 8), 3e-6, 6e-5)
    return Machine(2e13, 1e12, 6e-6, 1e-4)


def sample_seconds(observation: Observation, device_type: str) -> float:
    """A guess of the seconds for one sample inside a large chunk.

    Each operator is bound by arithmetic or by memory.
    """
    m = machine(device_type)
    return max(sum(max(c.flops / m.flops, c.bytes / m.bandwidth) for c in observation.costs), 1e-10)


def host_seconds(observation: Observation, device_type: str) -> float:
    """A guess of the seconds that a chunk costs the host, whatever its size."""
    m = machine(device_type)
    return m.chunk_seconds + m.launch_seconds * observation.calls


TELLING = 0.01
"""Seconds spent in chunks above which their measured speed is trusted."""


@dataclass(slots=True)
class Learned:
    """Measurements of earlier runs of a program on a device."""

    seconds: float = 0.0
    """Seconds spent in chunks so far."""
    samples: int = 0
    """Samples computed in chunks so far."""
    ceiling: int | None = None
    """Most samples in a chunk, found when memory ran out; None if it never did."""
    scale: float | None = None
    """Measured bytes of a chunk divided by predicted bytes; None before a measurement."""

    @property
    def sample_seconds(self) -> float | None:
        """Seconds per sample, once chunks have run for long enough to tell."""
        return self.seconds / self.samples if self.samples and self.seconds >= TELLING else None
