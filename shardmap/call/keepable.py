"""Reasons why a recording cannot be kept for later calls, and what tells two recordings apart."""

from __future__ import annotations

import torch

from shardmap._torch import generator_id, storage_id
from shardmap.call.reachable import VALUES
from shardmap.call.reads import Walk
from shardmap.rules.sparse import memory_of
from shardmap.trace.batch import Batch
from shardmap.trace.recording import Recording


def unfound(walk: Walk, recording: Recording) -> str:
    """A captured tensor or generator that the function reads and that has no name, or empty."""
    places = walk.found.places
    parts = {address for t in walk.found.tensors.values() for address in memory_of(t)}
    for tensor in recording.captured:
        if id(tensor) not in places:
            if storage_id(tensor.untyped_storage()) in parts:
                return f"it reads a tensor of shape {tuple(tensor.shape)}, a part of another one"
            return (
                f"it reads a tensor of shape {tuple(tensor.shape)} that cannot be found by name "
                "(closure, global, attribute, module parameter)"
            )
    given = {generator_id(g) for g in walk.found.generators}
    if any(generator_id(g) not in given for g in recording.generators):
        return "it draws from a torch.Generator that cannot be found by name"
    return ""


def memories_of(recording: Recording) -> tuple[int, ...]:
    """For each captured tensor the first one that has the same memory."""
    firsts: dict[int, int] = {}
    return tuple(
        [
            firsts.setdefault(storage_id(t.untyped_storage()), n)
            for n, t in enumerate(recording.captured)
            if t.layout is torch.strided
        ]
    )


def asking(recording: Recording) -> str:
    """A sentence's end for a function that asks about what differs by sample, or empty.

    What its other paths read has not been seen.
    """
    if not recording.asked:
        return ""
    return "it asks python about values that differ by sample (trace='once' keeps its paths)"


def asks_shared(recording: Recording) -> bool:
    """True if python has asked about the values of what all samples share, which may change."""
    return any(eq.answer is not None for eq in recording.program.equations)


def shared_arguments(batch: Batch) -> list[object]:
    """The arguments that all samples share, but numbers and texts, which the signature holds."""
    mapped = {i for i, _ in batch.mapped}
    return [
        leaf
        for i, leaf in enumerate(batch.leaves)
        if i not in mapped and not isinstance(leaf, VALUES)
    ]
