"""Write the outputs of a chunk into their slices of the result.

Each is written as early and as directly as possible.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardmap._torch import aten
from shardmap.lower.batched import BatchedProgram
from shardmap.lower.out_variants import into
from shardmap.rules.lowering import Call, V, values

_JOINS = (aten.stack.default, aten.cat.default)


@dataclass(slots=True)
class Placement:
    """The calls of a chunk, and the places that its outputs are written to.

    A place is python text that makes the tensor to write to.
    """

    calls: list[Call]
    """The chunk's calls, without those that only made an output dense or concatenated its parts."""
    writes: dict[int, tuple[Callable[..., Any] | None, list[str]]] = field(default_factory=dict)
    """For the number of a call: the function that computes its result into the first place, and the
    places; the others get copies, as do all if the function is None."""
    after: list[tuple[V, str]] = field(default_factory=list)
    """Values that are copied at the end, and their places."""


def place(program: BatchedProgram, outputs: Sequence[V], copied: bool = False) -> Placement:
    """Plan how each output gets into its slice, `d<index>`, a dense tensor.

    Args:
        program: The batched program.
        outputs: Its mapped outputs.
        copied: True if every output is computed into memory of its own and copied at the end.
    """
    if copied:
        return Placement(list(program.chunk), after=[(v, f"d{v.index}") for v in outputs])
    uses = collections.Counter(v.index for call in program.chunk for v in _arguments(call))
    makers = {o: call for call in program.chunk for o in call.outs if o is not None}
    untouched = not any(call.writes for call in program.chunk)
    goals: collections.deque[tuple[V, str, bool]] = collections.deque()
    dropped: set[int] = set()
    for v in outputs:
        source, maker = v, makers.get(v.index)
        if maker is not None and maker.target is torch.Tensor.contiguous and v.index not in uses:
            (source,) = values(maker.args)
            dropped.add(id(maker))
            uses[source.index] -= 1
        goals.append((source, f"d{v.index}", True))
    wanted: dict[int, list[tuple[V, str, bool]]] = {}
    several = collections.Counter(source.index for source, _, _ in goals)
    while goals:
        v, where, dense = goals.popleft()
        parts = (
            _parts(makers.get(v.index), where)
            if untouched and uses[v.index] == 0 and several[v.index] == 1
            else None
        )
        if parts is None:
            wanted.setdefault(v.index, []).append((v, where, dense))
            continue
        dropped.add(id(makers[v.index]))
        for part, slot in parts:
            uses[part.index] -= 1
            goals.append((part, slot, False))
            several[part.index] += 1
    found = Placement([call for call in program.chunk if id(call) not in dropped])
    number = {o: i for i, call in enumerate(found.calls) for o in call.outs if o is not None}
    last_write = max((i for i, call in enumerate(found.calls) if call.writes), default=-1)
    for index, places in wanted.items():
        i = number.get(index)
        v, _, dense = places[0]
        texts = [where for _, where, _ in places]
        writer = None
        # Others may take a view of it that only dense memory has.
        if i is not None and (dense or uses[index] == 0) and _shape_is_known(program, v, dense):
            writer = into(found.calls[i])
        if writer is not None and i is not None and (len(texts) == 1 or i > last_write):
            found.writes[i] = writer, texts
        elif i is not None and i > last_write and not found.calls[i].several:
            found.writes[i] = None, texts
        else:
            found.after += [(v, text) for text in texts]
    return found


def _arguments(call: Call) -> list[V]:
    return list(values((call.args, tuple(v for _, v in call.kwargs))))


def _shape_is_known(program: BatchedProgram, v: V, dense: bool) -> bool:
    """True if a call's result is known to have the slice's shape and dtype.

    `out=` would be resized for another shape, and cast for another dtype.

    Results of recorded calls have been compared with the recording before the first run; an output
    that is no such result was made dense by the rules themselves.
    """
    if v.index in program.results:
        return True
    return dense and v in program.outputs


def _parts(maker: Call | None, where: str) -> list[tuple[V, str]] | None:
    """The parts that a call concatenates, each with its slot.

    None if it is no concatenation.
    """
    if maker is None or maker.op not in _JOINS or not maker.mapped:
        return None
    tensors, *rest = maker.args
    d = rest[0] if rest else dict(maker.kwargs).get("dim", 0)
    if type(d) is not int or d < 1 or not all(type(v) is V and v.mapped for v in tensors):
        return None
    if maker.op is aten.stack.default:
        return [(v, f"{where}.select({d}, {i})") for i, v in enumerate(tensors)]
    slots, at = [], 0
    for v in tensors:
        if d > len(v.shape):
            return None
        length = v.shape[d - 1]
        slots.append((v, f"{where}.narrow({d}, {at}, {length})"))
        at += length
    return slots
