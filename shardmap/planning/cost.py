"""How long a chunk takes: operations and bytes give a first guess, chunks that have run the rest.

No calibration: the guess only orders devices and operators before anything has run. From the first
chunk on, the seconds that it took count, and chunks are handed out as devices become free, so that
a wrong guess costs nothing but balance in the first moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardmap.planning.observe import Observation


@dataclass(frozen=True, slots=True)
class Machine:
    """What a kind of device does, roughly."""

    flops: float
    """Floating-point operations per second, in kernels of everyday size."""
    bandwidth: float
    """Bytes per second from memory."""
    launch_seconds: float
    """Per call, spent by the host."""
    chunk_seconds: float
    """Per chunk, spent by the host outside of calls."""


def machine(device_type: str) -> Machine:
    """A typical device of that kind.

    A core of a server CPU times the threads in use, or a data-centre GPU.
    """
    if device_type == "cpu":
        threads = torch.get_num_threads()
        return Machine(2.5e10 * threads, 8e9 * min(threads, 8), 3e-6, 6e-5)
    return Machine(2e13, 1e12, 6e-6, 1e-4)


def sample_seconds(observation: Observation, device_type: str) -> float:
    """The guess for one sample inside a large chunk.

    Each operator is bound by arithmetic or by memory.
    """
    m = machine(device_type)
    return max(sum(max(c.flops / m.flops, c.bytes / m.bandwidth) for c in observation.costs), 1e-10)


def host_seconds(observation: Observation, device_type: str) -> float:
    """The guess for what a chunk costs the host, whatever its size."""
    m = machine(device_type)
    return m.chunk_seconds + m.launch_seconds * observation.calls


TELLING = 0.01
"""Seconds in chunks from which on their speed says more than the noise around them."""


@dataclass(slots=True)
class Learned:
    """What running a program on a device has shown."""

    seconds: float = 0.0
    """In chunks so far."""
    samples: int = 0
    """In chunks so far."""
    ceiling: int | None = None
    """Most samples in a chunk, after memory ran out."""
    scale: float | None = None
    """Measured over predicted bytes of a chunk."""

    @property
    def sample_seconds(self) -> float | None:
        """Seconds per sample, once chunks have run for long enough to tell."""
        return self.seconds / self.samples if self.samples and self.seconds >= TELLING else None
