"""Model of the memory that a map needs.

Fixed bytes and bytes per sample on each device, solved for the largest chunk that fits.

The words, as they are used everywhere here:

- *resident*: bytes that are there during the whole run, whatever the chunk: the stacked result
  where it is collected, captured tensors copied to the device, values that do not depend on the
  sample, and the activations that outer autograd saved of finished chunks.
- *chunk*: bytes that live only while one chunk is computed: copied inputs, intermediates, outputs
  before they are moved.
- *scale*: measured over predicted bytes of a chunk: kernels' workspaces and the allocator's gaps.
- *margin*: bytes added for what the model leaves out: kernels' buffers per thread and allocator
  gaps. A twenty-fifth, at most 32 MiB.
- *peak*: resident + scale * chunk + margin, an upper bound.
- *budget*: bytes that the map may add to those in use on the device when it begins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


MARGIN_BYTES, MARGIN_PART = 32 * MIB, 25
"""Measured with benchmarks/memory.py: up to 26 MiB beside the tensors, whatever the size of the
map."""


class Level(NamedTuple):
    """Bytes as a linear function of the number of samples."""

    fixed_bytes: int
    sample_bytes: int

    def at(self, samples: int) -> int:
        """Bytes for this many samples."""
        return self.fixed_bytes + samples * self.sample_bytes

    def __add__(self, other: tuple[int, ...]) -> Level:
        return Level(self.fixed_bytes + other[0], self.sample_bytes + other[1])


def envelope(levels: Iterable[Level]) -> tuple[Level, ...]:
    """The levels that are highest for some number of samples.

    A peak is piecewise linear in the chunk size.
    """
    best: list[Level] = []
    for level in sorted(set(levels), key=lambda v: (-v.sample_bytes, -v.fixed_bytes)):
        if not best or level.fixed_bytes > best[-1].fixed_bytes:
            best.append(level)
    return tuple(best) or (Level(0, 0),)


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """The memory of one map on one device."""

    resident_bytes: int
    """Bytes during the whole run, on this device."""
    chunk: tuple[Level, ...]
    """One chunk's bytes at each of its peaks, by its number of samples."""
    scale: float = 1.0
    """Measured bytes of the first chunk divided by predicted bytes."""
    backward: tuple[Level, ...] = ()
    """The same while a chunk's gradients are computed, if outer autograd is recording."""
    bound: bool = False
    """True if nothing has run, and these are a lower bound."""
    result_bytes: int = 0
    """Bytes of one sample's row of the stacked results."""
    stacked_bytes: int = 0
    """Part of `resident_bytes` that the stacked results take."""
    stored_bytes: int | None = None
    """Bytes of the results kept in memory if `out=` writes them to a store; None if it cannot."""
    reduced_bytes: int | None = None
    """Bytes of the results kept in memory if `reduce=` combines them; None if it cannot."""
    loose: Level = Level(0, 0)
    """Bytes of its results, and of their total, that a chunk holds besides if `reduce=` combines
    them."""
    kept_bytes: int = 0
    """Part of `resident_bytes` that outer autograd keeps of finished chunks until backward."""
    kept_results_bytes: int = 0
    """Part of `kept_bytes` that are the chunks' results, which no derivative reads."""
    again: tuple[Level, ...] = ()
    """`chunk` and `backward` if `remat=True` computes chunks again; empty if it cannot."""
    batch_bytes: int = 0
    """Part of `resident_bytes` that grows with the number of samples in the batch."""

    def chunk_bytes(self, samples: int) -> int:
        """Upper bound of the bytes that a chunk of this many samples adds while it is computed."""
        if samples == 0:
            return 0
        return math.ceil(
            self.scale * max(level.at(samples) for level in (*self.chunk, *self.backward))
        )

    def peak_bytes(self, samples: int) -> int:
        """Upper bound of the bytes for a run in chunks of this many samples."""
        needed = self.resident_bytes + self.chunk_bytes(samples)
        return needed + min(MARGIN_BYTES, needed // MARGIN_PART)

    def room_bytes(self, budget_bytes: int) -> int:
        """Bytes that a chunk may need for the peak to stay within the budget.

        Negative if the resident bytes exceed it already.
        """
        return (
            max(budget_bytes - MARGIN_BYTES, budget_bytes * MARGIN_PART // (MARGIN_PART + 1))
            - self.resident_bytes
        )

    def if_stored(self) -> MemoryModel | None:
        """The same map with `out=`; None if that is not possible, or no less."""
        return self._with_results(self.stored_bytes, 0, Level(0, 0))

    def if_reduced(self) -> MemoryModel | None:
        """The same map with `reduce=`; None if that is not possible, or no less."""
        return self._with_results(self.reduced_bytes, self.kept_results_bytes, self.loose)

    def if_again(self) -> MemoryModel | None:
        """The same map with `remat=True`; None if that is not possible."""
        if not self.again:
            return None
        # the chunks' results, and their concatenation
        resident = self.resident_bytes - self.kept_bytes + self.stacked_bytes
        batch = max(0, self.batch_bytes - self.kept_bytes + self.stacked_bytes)
        return dataclasses.replace(
            self,
            resident_bytes=resident,
            chunk=self.again,
            backward=(),
            loose=Level(0, 0),
            kept_bytes=self.stacked_bytes,
            kept_results_bytes=self.stacked_bytes,
            again=(),
            batch_bytes=batch,
        )

    def of_part(self, part: float) -> MemoryModel:
        """The same map of this part of the batch."""
        rest = math.floor(self.batch_bytes * (1 - part))
        return dataclasses.replace(self, resident_bytes=self.resident_bytes - rest)

    def _with_results(
        self, results_bytes: int | None, kept_bytes: int, loose: Level
    ) -> MemoryModel | None:
        """The same map with other bytes for its results, and without those that autograd keeps."""
        if results_bytes is None or results_bytes >= self.stacked_bytes:
            return None
        less = self.stacked_bytes + kept_bytes
        return dataclasses.replace(
            self,
            resident_bytes=self.resident_bytes - less + results_bytes,
            chunk=tuple([level + loose for level in self.chunk]),
            backward=tuple([level + loose for level in self.backward]),
            stacked_bytes=results_bytes,
            stored_bytes=None,
            reduced_bytes=None,
            kept_bytes=self.kept_bytes - kept_bytes,
            kept_results_bytes=0,
            batch_bytes=max(0, self.batch_bytes - less),
        )

    def largest_chunk(self, bytes_limit: int, most: int) -> int:
        """The most samples, up to `most`, whose chunk needs at most `bytes_limit`.

        0 if not even one fits.

        Each level is a line, so each gives a bound, and the smallest bound holds.
        """
        asked = most
        for level in (*self.chunk, *self.backward):
            fixed, sample = self.scale * level.fixed_bytes, self.scale * level.sample_bytes
            if fixed > bytes_limit:
                return 0
            if sample:
                most = min(most, int((bytes_limit - fixed) // sample))
        most = max(most, 0)
        while most and self.chunk_bytes(most) > bytes_limit:  # floats round, either way
            most -= 1
        while most < asked and self.chunk_bytes(most + 1) <= bytes_limit:
            most += 1
        return most


NOTHING = MemoryModel(0, (Level(0, 0),))
"""Model of a map that is too small for its memory to matter."""


def format_bytes(count: float) -> str:
    """Format bytes for plans and errors: `9.1 GiB`."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{int(count)} B"


_UNITS = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": GIB << 10,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


def parse_bytes(text: str) -> int | None:
    """Bytes from text such as `6GiB`, `512 MB` or `1048576`; None if it is none of these."""
    stripped = text.strip().lower()
    digits = stripped.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = _UNITS.get(stripped[len(digits) :].strip())
    try:
        number = float(digits)
    except ValueError:
        return None
    if unit is None or not 1 <= number * unit < float("inf"):
        return None
    return int(number * unit)
