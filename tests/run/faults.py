"""Faults that tests make happen in chunks, by a script, and what tests ask of the outcome."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from shardmap.planning.split import Chunk
from shardmap.run.base import ChunkDone, ChunkRedone
from tests import oracle

SAMPLES = 13
OUT_OF_MEMORY: tuple[Callable[[], Exception], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8 bytes"
    ),
    lambda: MemoryError(),
    lambda: MemoryError("Unable to allocate 3 GiB for an array"),
)
DIES = "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"


@dataclass(frozen=True)
class Pretend:
    """A device of its own in name, and really the CPU."""

    name: str
    type: str = "cpu"

    def __str__(self) -> str:
        return self.name


@dataclass
class Script:
    """The faults that are injected, and the samples that were computed."""

    early: Callable[[Any, Chunk, int], None] = lambda lane, chunk, call: None
    """Called before a chunk is computed, with the number of the call; may raise."""
    late: Callable[[Any, Chunk, int], None] = lambda lane, chunk, call: None
    """Called after it."""
    calls: int = 0
    computed: collections.Counter[int] = field(default_factory=collections.Counter)
    """Number of times that each sample was computed."""
    by_lane: collections.Counter[int] = field(default_factory=collections.Counter)
    """Samples computed by each lane."""
    made: list[StorageWeakRef] = field(default_factory=list)
    """The memory of all results."""


def at(
    call: int, make: Callable[[], BaseException], lane: int | None = None
) -> Callable[[Any, Chunk, int], None]:
    """Raise in the given call, or in the lane's."""

    def fail(there: Any, chunk: Chunk, number: int) -> None:
        if number == call and lane in (None, there.number):
            raise make()

    return fail


def once_from(call: int, make: Callable[[], BaseException]) -> Callable[[Any, Chunk, int], None]:
    """Raise once, in the given call or a later one, for a chunk that can be halved."""
    raised: list[int] = []

    def fail(there: Any, chunk: Chunk, number: int) -> None:
        if number >= call and chunk.size > 1 and not raised:
            raised.append(number)
            raise make()

    return fail


def larger_than(size: int) -> Callable[[Any, Chunk, int], None]:
    """Memory for so many samples and no more."""

    def fail(lane: Any, chunk: Chunk, number: int) -> None:
        if chunk.size > size:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return fail


def batch_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def function(x: torch.Tensor) -> Any:
    return x.sin() * x, x.outer(x).sum(0)


def same(got: Any, want: Any, what: str = "output") -> None:
    for i, (g, w) in enumerate(
        zip(
            torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True
        )
    ):
        oracle.assert_same(g, w, f"{what} {i}")


def redone(events: list[Any]) -> list[ChunkRedone]:
    return [e for e in events if isinstance(e, ChunkRedone)]


def done(events: list[Any]) -> list[ChunkDone]:
    return [e for e in events if isinstance(e, ChunkDone)]
