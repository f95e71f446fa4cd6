"""Reasons why the guards of a recording do not suffice for later calls."""

from __future__ import annotations

from shardmap._torch import generator_id, storage_id
from shardmap.call.reads import Walk
from shardmap.rules.sparse import memory_of
from shardmap.trace.recording import Recording, element


def why_not(walk: Walk, recording: Recording) -> str:
    """The reason why a recording is not kept for later calls; empty if it can be."""
    return walk.blame or _unfound(walk, recording)


def _unfound(walk: Walk, recording: Recording) -> str:
    """A captured tensor or generator that the function reads and that has no name, or empty."""
    places = walk.found.places
    parts = {address for t in walk.found.tensors.values() for address in memory_of(t)}
    for tensor in recording.captured:
        if id(tensor) not in places:
            if storage_id(element(tensor).untyped_storage()) in parts:
                return f"it reads a tensor of shape {tuple(tensor.shape)}, a part of another one"
            return (
                f"it reads a tensor of shape {tuple(tensor.shape)} that cannot be found by name "
                "(closure, global, attribute, module parameter)"
            )
    given = {generator_id(g) for g in walk.found.generators}
    if any(generator_id(g) not in given for g in recording.generators):
        return "it draws from a torch.Generator that cannot be found by name"
    return ""
