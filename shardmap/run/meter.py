"""Compare the memory that a lane's first chunks take with the prediction."""

from __future__ import annotations

import torch

from shardmap.planning import device as devices
from shardmap.planning.speeds import Learned
from shardmap.planning.split import Chunk, Lane

LEARN_FROM = 32 << 20
"""Bytes of a chunk from which its measured peak is larger than the noise of the process."""
CHUNKS = 4
"""Number of chunks whose peaks are measured."""
MARGIN, LEAST, MOST = 1.05, 0.75, 4.0
"""Bounds of a chunk's measured peak over the predicted one: a margin is added, and the ratio is
clamped to [0.75, 4] so that unrelated allocations cannot skew it."""


class Meter:
    """Compares the peaks of a lane's first chunks with the prediction, where they can be measured.

    The first alone is not enough: the allocator's gaps grow for a chunk or two before they are
    reused.
    """

    def __init__(
        self, learned: Learned, plan: Lane, device: torch.device, result_bytes: int, chunks: int
    ):
        self.learned = learned
        self.levels = plan.memory.chunk
        self.predicted = self._predicted_of(min(plan.most, plan.rows))
        self.meter = (
            devices.Meter(device)
            if chunks and self.predicted >= LEARN_FROM and learned.scale is None
            else None
        )
        self.result_bytes = result_bytes
        """Bytes per sample of the result's pages that become resident as they are written."""
        self.chunks = chunks
        self.left = chunks
        self.before: tuple[int, int] | None = None
        self.samples = 0
        """Samples computed since the measurement began."""
        self.largest = 0
        """Samples in the largest chunk that was measured."""

    def _predicted_of(self, size: int) -> int:
        return max(level.at(size) for level in self.levels)

    def watches(self, chunk: Chunk) -> bool:
        """True if a chunk is measured: one of the first, or of the first that are as large."""
        if self.meter is None:
            return False
        if chunk.size > self.largest and self.chunks > 1:
            self.left = self.chunks
        return self.left > 0

    def start(self) -> None:
        """Begin to measure a chunk."""
        if self.before is None and self.meter is not None:
            self.before = self.meter.read()
            self.samples = 0

    def finish(self, chunk: Chunk) -> None:
        """End the measurement of a chunk: keep its peak if it exceeds all before."""
        self.left -= 1
        self.samples += chunk.size
        self.largest = max(self.largest, chunk.size)
        predicted = self._predicted_of(self.largest)
        after = self.meter.read() if self.meter is not None else None
        if self.before is None or after is None or after[1] <= self.before[1]:
            return
        if predicted < LEARN_FROM:
            return
        measured = after[1] - self.before[0] - self.samples * self.result_bytes
        scale = min(max(measured / predicted * MARGIN, LEAST), MOST)
        self.learned.scale = max(scale, self.learned.scale or 0.0)
