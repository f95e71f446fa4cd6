"""Cut a batch into shards, one per device, and shards into chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive samples that run together on one device."""

    device: str
    start: int
    stop: int
    """One past the last sample."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which samples run where: chunks in the order of the batch."""

    samples: int
    devices: tuple[str, ...]
    chunks: tuple[Chunk, ...]

    def shards(self) -> Iterator[tuple[str, tuple[Chunk, ...]]]:
        """Each device entry with its chunks, in the order of the batch."""
        bounds = _bounds(self.samples, len(self.devices))
        for device, (start, stop) in zip(self.devices, bounds, strict=True):
            yield device, tuple(c for c in self.chunks if start <= c.start and c.stop <= stop and c.start < c.stop)

    def __str__(self) -> str:
        rows = [("shard", "device", "samples", "chunks", "largest chunk")]
        for number, (device, chunks) in enumerate(self.shards()):
            sizes = [c.stop - c.start for c in chunks]
            rows.append((str(number), device, str(sum(sizes)), str(len(sizes)), str(max(sizes, default=0))))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _bounds(samples: int, parts: int) -> list[tuple[int, int]]:
    """`samples` cut into `parts` runs whose sizes differ by at most one, the larger first."""
    size, extra = divmod(samples, parts)
    bounds, start = [], 0
    for i in range(parts):
        stop = start + size + (i < extra)
        bounds.append((start, stop))
        start = stop
    return bounds


def split(samples: int, devices: tuple[str, ...], chunk_size: int | None) -> Plan:
    """The plan that gives each device an even share and cuts it into chunks.

    Args:
        samples: Size of the batch. An empty batch is one empty chunk.
        devices: One entry per shard; a device may be named twice.
        chunk_size: Most samples per chunk; None for one chunk per shard.
    """
    chunks = []
    for device, (start, stop) in zip(devices, _bounds(samples, len(devices)), strict=True):
        step = chunk_size or max(stop - start, 1)
        chunks += [Chunk(device, at, min(at + step, stop)) for at in range(start, stop, step)]
    return Plan(samples, devices, tuple(chunks) or (Chunk(devices[0], 0, 0),))
