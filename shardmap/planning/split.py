"""Cut a batch among devices, and choose the chunk size of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from shardmap.planning.cost import cpu_chunk_seconds, host_seconds, sample_seconds
from shardmap.planning.memory import NOTHING, MemoryModel
from shardmap.planning.observe import Observation
from shardmap.planning.speeds import (
    PART,
    Learned,
    Speed,
    even,
    next_size,
    remembered,
    sizes_to_try,
)

NEARLY = 1.03
"""Ratio to the least estimated time up to which a smaller chunk is taken: it needs less memory."""
LONG_SECONDS = 2e-3
"""Least expected time of a run whose chunk sizes are worth measuring."""
SATURATION = 20
"""Least ratio, on an accelerator, of a chunk's computing time to its launches' time on the host, so
that the host stays ahead."""
CHUNKS_PER_LANE = 4
"""Chunks for each of several lanes, so that a slow one can do less."""


class Chunk(NamedTuple):
    """Consecutive samples that are computed together."""

    start: int
    stop: int
    """One past the last sample."""

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Lane:
    """One entry of `devices` and the work that it is expected to do.

    Chunks are handed out as lanes become free.
    """

    name: str
    """The device, with a number if it is named more than once: `cpu#2`."""
    device: str
    rows: int
    """Number of samples that it is expected to compute."""
    chunk: int
    """Most samples computed at a time."""
    memory: MemoryModel
    budget_bytes: int | None
    """Bytes that the map may add to what the device already uses; None if unknown."""
    seconds: float
    """Expected seconds for its rows."""
    measured: bool
    """True if `seconds` comes from chunks that have run; otherwise it is a guess from operations
    and bytes."""
    worker: str = ""
    """The cluster process that computes it; empty for this process."""
    trials: tuple[int, ...] = ()
    """Chunk sizes that the run may try besides, ascending; empty if its chunks are of one size."""
    speeds: tuple[Speed, ...] = ()
    """Measured speeds of earlier chunks, by ascending size, where chunks are sized by them."""
    estimated: int | None = None
    """Chunk size by the estimate; None if another choice was made without one."""

    @property
    def most(self) -> int:
        """Most samples that are computed at a time, trials included."""
        return max(self.chunk, *self.trials) if self.trials else self.chunk

    @property
    def turns(self) -> tuple[str, str]:
        """Worker and device; lanes that share both take turns."""
        return self.worker, self.device

    @property
    def chunks(self) -> int:
        """Number of chunks its rows make."""
        return -(-self.rows // self.chunk) if self.rows else 0

    @property
    def peak_bytes(self) -> int:
        """Predicted upper bound of the bytes that the map adds on the device.

        Where only a lower bound is known: that of chunks of one sample, which is what was refused.
        """
        return self.memory.peak_bytes(min(1 if self.memory.bound else self.most, self.rows))

    @property
    def fits(self) -> bool:
        """True if the peak is within the budget."""
        return self.budget_bytes is None or not self.rows or self.peak_bytes <= self.budget_bytes


@dataclass(frozen=True, slots=True)
class Collected:
    """Results that are collected on a device that computes nothing."""

    device: str
    bytes: int
    budget_bytes: int | None
    grad: bool = False
    """True if gradients flow from outside: such results cannot go to a store."""

    @property
    def fits(self) -> bool:
        """True if they are within the budget."""
        return self.budget_bytes is None or self.bytes <= self.budget_bytes


@dataclass(frozen=True, slots=True)
class Split:
    """A batch cut among lanes."""

    samples: int
    lanes: tuple[Lane, ...]
    collected: Collected | None = None

    @property
    def fits(self) -> bool:
        """True if every lane's peak is within its budget."""
        return all(lane.fits for lane in self.lanes) and (
            self.collected is None or self.collected.fits
        )

    @property
    def seconds(self) -> float:
        """Expected seconds: devices compute side by side, lanes of one device in turn."""
        seconds: dict[tuple[str, str], float] = {}
        for lane in self.lanes:
            seconds[lane.turns] = seconds.get(lane.turns, 0.0) + lane.seconds
        return max(seconds.values(), default=0.0)


def chunks_of(samples: int, step: int) -> tuple[Chunk, ...]:
    """The batch in chunks of at most `step` samples, in order.

    An empty batch is one empty chunk.
    """
    return tuple(Chunk(at, min(at + step, samples)) for at in range(0, samples, step)) or (
        Chunk(0, 0),
    )


def cut(samples: int, parts: int) -> list[int]:
    """`samples` in `parts` sizes that differ by at most one, the larger first."""
    size, extra = divmod(samples, parts)
    return [size + (i < extra) for i in range(parts)]


def lane_names(names: Sequence[str]) -> list[str]:
    """Names of the lanes.

    A lane has the name of its device, numbered where the device is named more than once.
    """
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(f"{name}#{seen[name]}" if names.count(name) > 1 else name)
    return out


@dataclass(frozen=True, slots=True)
class Site:
    """Facts about a device that are known before the batch is cut."""

    device: str
    memory: MemoryModel
    budget_bytes: int | None
    learned: Learned
    whole: bool
    """True if cutting saves nothing: outer autograd keeps what each chunk saved until backward."""
    observation: Observation | None
    """Cost of a chunk; None if the map is too small to be worth measuring."""
    probing: bool = False
    """True if chunk sizes may be chosen by measured speed."""
    unit: int | None = None
    """Samples in a unit of the store that results go to: chunks lie within one; None without."""


def split(
    samples: int,
    sites: Sequence[Site],
    chunk_size: Any,
    uniform: bool = False,
    collected: Collected | None = None,
    sharing: int = 1,
) -> Split:
    """Cut a batch among devices.

    Args:
        samples: N, the size of the batch.
        sites: One per entry of `devices`.
        chunk_size: "auto", an int, None for all of a device's share, or a mapping from device names
            to any of these.
        uniform: True if all devices take chunks of one size, so that the combination of partial
            results does not depend on which device computes them.
        collected: The results, if they are collected on a device that computes nothing.
        sharing: Processes that compute on this machine side by side, and so share its CPU's cache.
    """
    speeds = [1 / _sample_seconds(site) for site in sites]
    rows = _shares(samples, speeds)
    sizes = [
        _chunk(samples, share, site, _wanted(chunk_size, site.device), len(sites), sharing)
        for share, site in zip(rows, sites, strict=True)
    ]
    if uniform:
        least = min(size.chunk for size in sizes)
        sizes = [size._replace(chunk=least, trials=()) for size in sizes]
    lanes = [
        Lane(
            name,
            site.device,
            share,
            size.chunk,
            site.memory,
            site.budget_bytes,
            _seconds(site, share, size.chunk),
            site.learned.sample_seconds is not None,
            trials=size.trials,
            speeds=size.speeds,
            estimated=size.estimated,
        )
        for name, site, share, size in zip(
            lane_names([s.device for s in sites]), sites, rows, sizes, strict=True
        )
    ]
    return Split(samples, tuple(lanes), collected)


def unplanned(samples: int, device: str) -> Split:
    """The whole batch as one chunk on one device, whatever it needs."""
    return split(samples, [Site(device, NOTHING, None, Learned(), False, None)], None)


def _sample_seconds(site: Site) -> float:
    known = site.learned.sample_seconds
    if known is not None:
        return max(known, 1e-10)
    kind = site.device.partition(":")[0]
    return sample_seconds(site.observation, kind) if site.observation is not None else 1e-6


def _seconds(site: Site, share: int, size: int) -> float:
    """Expected seconds for a device's share, in chunks of this size."""
    seconds = share * _sample_seconds(site)
    if site.learned.sample_seconds is None and site.observation is not None:
        seconds += -(-share // size) * host_seconds(site.observation, site.device.partition(":")[0])
    return seconds


def _shares(samples: int, speeds: Sequence[float]) -> list[int]:
    """Samples for each device in proportion to its speed; the first gets the remainder."""
    total = sum(speeds)
    shares = [int(samples * s / total) for s in speeds]
    if len(set(speeds)) == 1:
        return cut(samples, len(speeds))
    for i in range(samples - sum(shares)):
        shares[i % len(shares)] += 1
    return shares


def _wanted(chunk_size: Any, device: str) -> Any:
    if not isinstance(chunk_size, Mapping):
        return chunk_size
    return chunk_size.get(device, chunk_size.get(device.partition(":")[0], "auto"))


class _Size(NamedTuple):
    """The chunk size of a lane, and how it was found: see `Lane`."""

    chunk: int
    trials: tuple[int, ...] = ()
    speeds: tuple[Speed, ...] = ()
    estimated: int | None = None


def _chunk(samples: int, share: int, site: Site, wanted: Any, lanes: int, sharing: int) -> _Size:
    """The most samples that one device computes at a time."""
    ceiling = site.learned.ceiling
    most = max(1, share) if ceiling is None else max(1, min(share, ceiling))
    if wanted is None:
        return _Size(most)
    if wanted != "auto":
        return _Size(int(wanted) if ceiling is None else min(int(wanted), ceiling))
    if site.memory.bound:
        return _Size(1)
    if site.observation is None:
        return _Size(most)
    if lanes > 1:
        most = min(most, max(1, -(-samples // (CHUNKS_PER_LANE * lanes))))
    if site.budget_bytes is not None:
        room = site.memory.room_bytes(site.budget_bytes)
        most = max(1, site.memory.largest_chunk(room, most))
    if site.whole or not share:
        return _Size(even(share, most))
    if site.unit is not None:
        most = min(most, site.unit)
    rows = share if site.unit is None else min(share, site.unit)
    guess = even(rows, _estimate(site, site.observation, most, sharing))
    if not site.probing or share * _sample_seconds(site) < LONG_SECONDS:
        return _Size(guess, estimated=guess)
    speeds = site.learned.measured()
    start = even(rows, remembered(speeds, most, guess) or guess)
    trials = sizes_to_try(rows, most, start)
    chunk = next_size(speeds, trials, start, rows, begins=True)
    # What the run cannot reach is no part of its peak.
    trials = tuple([size for size in trials if size <= chunk or PART * size <= rows - chunk])
    seen = tuple(sorted(speeds.values()))
    return _Size(chunk, trials, seen, guess)


def _estimate(site: Site, seen: Observation, most: int, sharing: int) -> int:
    """The chunk size that is best by the estimate: nothing has been measured.

    On CPU a larger chunk shares launches and the weights that are read among more samples, and
    occupies the threads; a smaller one keeps its intermediates in cache. An accelerator is given
    the smallest chunk whose arithmetic hides the launches.
    """
    kind = site.device.partition(":")[0]
    if kind != "cpu":
        saturating = int(SATURATION * host_seconds(seen, kind) / sample_seconds(seen, kind))
        return max(1, min(most, saturating))
    sizes = tuple(sorted({*[1 << k for k in range(most.bit_length())], most}))
    memory = replace(site.memory, backward=())  # only the forward's memory matters for speed
    each = cpu_chunk_seconds(seen, memory, sizes, sharing) / sizes
    return next(size for size, s in zip(sizes, each, strict=True) if s <= NEARLY * each.min())
