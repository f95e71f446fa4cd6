"""The recordings of one function for samples of many shapes, kept between calls.

A recording costs as much as a few samples, so that for forty shapes it could cost more than
computing two thousand samples. With `trace="once"` the recordings are those of the map. With
`trace="each"` one shape is recorded at each call: if that recording and all that the function can
reach are unchanged, those of the other shapes are used; else all are made anew.
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
from shardmap.trace.watch import PythonWatch

SHAPES = 1024
"""Number of signatures of one function whose recordings are kept."""


class ShapeMemory(Memory):
    """The recordings of a function by the samples' shape; they do not keep the function alive."""

    most = SHAPES

    def __init__(self, func: Callable[..., object], call: str):
        super().__init__(func, call)
        self._func = weakref.ref(func)
        self.said = True  # no warning: the user did not request it

    def is_of(self, func: Callable[..., object]) -> bool:
        """True if the recordings are those of this very function."""
        return self._func() is func

    def held(self, reads: list[object]) -> list[object]:
        """The part of a listing that is kept."""
        return held_weakly(reads)


_memories: weakref.WeakKeyDictionary[object, dict[tuple[str, str], ShapeMemory]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.RLock()


def clear() -> None:
    """Drop the recordings of all functions."""
    with _lock:
        _memories.clear()


def after_fork() -> None:
    """Renew the lock of this module."""
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
    """The recordings that one call of several shapes reuses and adds.

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
        """True if earlier recordings may be used; None until one shape has been recorded."""
        self._reads: list[object] | None = None
        self._recorded: Batch | None = None
        if self._once and self._memory is not None:
            self._memory.most = max(self._memory.most, SHAPES)

    def recall(self, batch: Batch) -> Remembered | None:
        """The recording that serves samples of this shape, if there is a valid one."""
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
        """Keep a recording of this call."""
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

    def watch(self, batch: Batch) -> PythonWatch | None:
        """The watch for this call's recording: none, since all that can be reached counts."""
        del batch
        return None

    def record_all(self) -> None:
        """Record all shapes anew in this call."""
        self._trusted = False

    def forget(self, batch: Batch) -> None:
        """Drop the recording for samples of this shape because it is stale."""
        if self._memory is not None:
            self._memory.forget(batch)

    def finish(self) -> None:
        """Drop the call's recordings if values that the function reads have changed meanwhile."""
        if self._recorded is None or self._memory is None:
            return
        assert self._reads is not None
        if not same(self._reads, self._memory.reads(self._recorded)):
            self._memory.kept.clear()


def _same(before: Recording, now: Recording) -> bool:
    """True if two recordings have the same calls with the same tensors and numbers."""
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
