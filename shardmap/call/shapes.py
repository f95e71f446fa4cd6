"""The recordings of one function for samples of many shapes, remembered from call to call.

Recording costs as much as a few samples, so that of forty shapes it would cost more than computing
two thousand samples. With `trace="once"` the recordings are those of the map. With `trace="each"`
one shape is recorded at each call: where that recording and all that the function can reach are
what they were, those of the other shapes stand; else all are made anew.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable

import torch

from shardmap.call.memo import Memory, Prepared, Remembered
from shardmap.call.reachable import held_weakly, same
from shardmap.trace.batch import Batch
from shardmap.trace.recording import Recording

SHAPES = 1024
"""Signatures of one function that are remembered."""


class ShapeMemory(Memory):
    """The recordings of a function for samples of each shape, which keep the function not alive."""

    most = SHAPES

    def __init__(self, func: Callable[..., object], call: str):
        super().__init__(func, call)
        self._func = weakref.ref(func)
        self.said = True  # nobody has asked for it

    def is_of(self, func: Callable[..., object]) -> bool:
        """Whether the recordings are those of this very function."""
        return self._func() is func

    def held(self, reads: list[object]) -> list[object]:
        """What is kept of a listing."""
        return held_weakly(reads)


_memories: weakref.WeakKeyDictionary[object, dict[tuple[str, str], ShapeMemory]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.RLock()


def clear() -> None:
    """Forget the recordings of all functions."""
    with _lock:
        _memories.clear()


def after_fork() -> None:
    """Make the lock of this module new."""
    global _lock
    _lock = threading.RLock()


def _memory_of(func: Callable[..., object], randomness: str, call: str) -> ShapeMemory | None:
    """The recordings of a function; None for one without a hash or weak references."""
    key = randomness, call
    try:
        with _lock:
            own = _memories.setdefault(func, {})
            found = own.get(key)
            if found is None or not found.is_of(func):
                found = own[key] = ShapeMemory(func, call)
            return found
    except TypeError:
        return None


class ShapesOfCall:
    """What one call of several shapes recalls of earlier ones, and what it adds.

    Args:
        func: The user's function.
        memory: The recordings that the map keeps; None with `trace="each"`.
        randomness: As for `shardmap.vmap`.
        call: The user's call.
    """

    def __init__(
        self, func: Callable[..., object], memory: Memory | None, randomness: str, call: str
    ):
        self._once = memory is not None
        self._memory = _memory_of(func, randomness, call) if memory is None else memory
        self._trusted: bool | None = self._once or None
        """Whether recordings of earlier calls stand; None until one shape has been recorded."""
        self._reads: list[object] | None = None
        self._recorded: Batch | None = None
        if self._once and self._memory is not None:
            self._memory.most = max(self._memory.most, SHAPES)

    def recall(self, batch: Batch) -> Remembered | None:
        """The recording that serves samples of this shape, if there is one that stands."""
        if self._memory is None:
            return None
        if self._reads is None:
            self._reads = self._memory.reads(batch)
        found = self._memory.recall(batch, self._reads) if self._trusted else None
        if found is None:
            return None
        # What becomes of outputs is the options', and maps of one function may have others.
        derived = found.prepared.derived if self._once else {}
        own = dataclasses.replace(found.prepared, lowerings={}, outputs={}, derived=derived)
        return dataclasses.replace(found, prepared=own)

    def keep(self, batch: Batch, prepared: Prepared) -> None:
        """Remember a recording of this call."""
        if self._memory is None:
            return
        if self._trusted is None:
            known = self._memory.recall(batch, self._reads)
            self._trusted = known is not None and _same(
                known.prepared.recording, prepared.recording
            )
            if self._trusted:
                return
            self._memory.kept.clear()
        self._recorded = batch
        self._memory.keep(batch, prepared, self._reads)

    def record_all(self) -> None:
        """Record all shapes anew in this call."""
        self._trusted = False

    def forget(self, batch: Batch) -> None:
        """Drop the recording for samples of this shape: it has gone stale."""
        if self._memory is not None:
            self._memory.forget(batch)

    def finish(self) -> None:
        """Forget what was recorded if what the function reads has changed meanwhile."""
        if self._recorded is None or self._memory is None:
            return
        assert self._reads is not None
        if not same(self._reads, self._memory.reads(self._recorded)):
            self._memory.kept.clear()


def _same(before: Recording, now: Recording) -> bool:
    """Whether two recordings are of the same calls with the same tensors and numbers."""
    return (
        before.program is now.program
        and before.scalars == now.scalars
        and repr(before.scalars) == repr(now.scalars)
        and len(before.captured) == len(now.captured)
        and all(a is b for a, b in zip(before.captured, now.captured, strict=True))
        and len(before.literals) == len(now.literals)
        and all(map(_equal, before.literals, now.literals))
        and [id(g) for g in before.generators] == [id(g) for g in now.generators]
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
