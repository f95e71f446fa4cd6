"""Results that differ in the order of their keys only: `{"a": 1, "b": 2}` and `{"b": 2, "a": 1}`.

Python calls such dictionaries equal. The map returns them in the order of the first sample's.
"""

from __future__ import annotations

import dataclasses

from shardmap._torch import pytree
from shardmap.trace.recording import Recording


def positions(own: pytree.TreeSpec, wanted: pytree.TreeSpec) -> list[int] | None:
    """For each leaf of one structure, its position among those of another.

    Returns:
        The positions; None if the structures differ in more than the order of keys.
    """
    count = own.num_leaves
    if own == wanted:
        return list(range(count))
    try:
        found = wanted.flatten_up_to(pytree.tree_unflatten(range(count), own))
    except ValueError:
        return None
    alike = len(found) == count and all(type(k) is int for k in found)
    return found if alike and _kinds(own) == _kinds(wanted) else None


def _kinds(structure: pytree.TreeSpec) -> tuple[object, ...]:
    """The kinds of containers of a structure, whatever the order of keys."""
    inside = list(structure.children())
    if structure.type is dict:
        by_key = dict(zip(map(str, structure.context), inside, strict=True))
        inside = [by_key[key] for key in sorted(by_key)]
    return (structure.type, *map(_kinds, inside))


def in_order_of(
    pair: tuple[Recording, pytree.TreeSpec], wanted: pytree.TreeSpec | None
) -> tuple[Recording, pytree.TreeSpec]:
    """A recording with its outputs in the order of another's keys; as it is if it differs more."""
    recording, own = pair
    if wanted is None or own == wanted:
        return pair
    order = positions(own, wanted)
    if order is None:
        return pair
    program = recording.program
    program = program._replace(
        outputs=tuple([program.outputs[k] for k in order]),
        output_flags=tuple([program.output_flags[k] for k in order]),
    )
    sample = tuple([recording.sample[k] for k in order]) if recording.sample else ()
    return dataclasses.replace(recording, program=program, sample=sample), wanted
