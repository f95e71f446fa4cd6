"""The least memory that a program needs, found from its text: nothing runs.

A recorded sample tells the size of every value. Walking the calls in their order, with each value
alive from the call that makes it to the last one that reads it, gives the bytes that must be there
at once. Kernels' workspaces come on top, so what exceeds a budget here exceeds it when it runs, and
can be refused at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from shardmap._torch import aten, schema_of
from shardmap.lower.batched import BatchedProgram
from shardmap.program.ir import Equation, Program, Spec
from shardmap.program.operators import op_info
from shardmap.rules.lowering import Call, V, values

_FRESH_COMPOSITES = {aten.matmul.default, aten.linear.default, aten.outer.default}
"""Composite operators whose result is never a view of an argument."""


class _Step(NamedTuple):
    """One call and the memory blocks that it makes and reads."""

    makes: tuple[tuple[int, int], ...]
    """The blocks of memory that it makes, each with its bytes."""
    reads: tuple[int, ...]
    """The blocks that it reads or makes: they are alive until it is done."""


def recorded_peak(program: Program) -> int:
    """Bytes that are alive at once when the recorded calls are computed for one sample.

    The sample itself and the captured tensors do not count. Outputs are alive to the end.
    """
    given = {v.group for v in (*program.inputs, *program.captured, *program.literals)}
    sizes: dict[int, int] = {}
    for eq in program.equations:
        for v in eq.results():
            if v.group not in given:
                sizes[v.group] = max(sizes.get(v.group, 0), _touched(v.spec))
    seen: set[int] = set()
    steps = []
    for eq in program.equations:
        made = {v.group for v in eq.results()} & sizes.keys()
        read = {v.group for v in eq.inputs()} & sizes.keys()
        steps.append(_Step(tuple([(g, sizes[g]) for g in made - seen]), (*made, *read)))
        seen |= made
    return _peak(steps, {v.group for v in program.outputs})


def chunk_bound(program: Program, batched: BatchedProgram, elsewhere: Collection[int] = ()) -> int:
    """Bytes that a chunk of one sample holds at least, beside its inputs and captured tensors.

    Args:
        program: The recorded program.
        batched: The same, lowered.
        elsewhere: Positions of outputs whose memory is counted elsewhere: chunks write them into
            the result.
    """
    known = _values(batched)
    block: dict[int, int] = {}
    """For each value the block of memory that it lies in; values that were given have none."""
    size: dict[int, int] = {}
    steps = []
    for call in (*batched.fixed, *batched.chunk):
        arguments = [v for v in values((call.args, tuple(v for _, v in call.kwargs)))]
        outs = [known[i] for i in call.outs if i is not None and i in known]
        makes = []
        for v in outs:
            if _fresh(call, v, program, batched):
                block[v.index] = v.index
                size[v.index] = v.numel * v.dtype.itemsize
                makes.append((v.index, size[v.index]))
            else:
                # A view, or perhaps one: it lies in the largest block among the arguments.
                candidates = [block[a.index] for a in arguments if a.index in block]
                if candidates:
                    block[v.index] = max(candidates, key=size.__getitem__)
        touched = [block[v.index] for v in (*arguments, *outs) if v.index in block]
        steps.append(_Step(tuple(makes), tuple(touched)))
    written = {block.get(batched.outputs[k].index) for k in elsewhere}
    steps = [_Step(tuple([m for m in s.makes if m[0] not in written]), s.reads) for s in steps]
    last = {block[v.index] for v in batched.outputs if v.index in block}
    return _peak(steps, last)


def _peak(steps: Iterable[_Step], kept: Collection[int]) -> int:
    """The most bytes alive at once; the blocks `kept` stay to the end."""
    steps = list(steps)
    last: dict[int, int] = {}
    for number, step in enumerate(steps):
        for block in step.reads:
            last[block] = number
    alive: dict[int, int] = {}
    now = most = 0
    for number, step in enumerate(steps):
        for block, size in step.makes:
            alive[block] = size
            now += size
        most = max(most, now)
        for block in step.reads:
            if last[block] == number and block not in kept:
                now -= alive.pop(block, 0)
    return most


def _fresh(call: Call, v: V, program: Program, batched: BatchedProgram) -> bool:
    """True if a call is sure to put a result into memory of its own."""
    if call.writes:
        return False
    if call.op is not None:
        if call.op is aten._unsafe_view.default:
            return False
        if op_info(call.op).composite and call.op not in _FRESH_COMPOSITES:
            return False
        return all(r.alias_info is None for r in schema_of(call.op).returns)
    number = call.equation
    return (
        v.index in batched.results
        and number < len(program.equations)
        and _from_slow_tier(program.equations[number], batched)
    )


def _from_slow_tier(equation: Equation, batched: BatchedProgram) -> bool:
    """True if `torch.func.vmap` or a loop serves a recorded call whose results are no views."""
    if batched.tiers.get(equation.op.name()) not in ("functorch", "loop"):
        return False
    aliases = any(r.alias_info is not None for r in schema_of(equation.op).returns)
    return not aliases and not op_info(equation.op).composite


def _values(batched: BatchedProgram) -> dict[int, V]:
    """Every value whose shape is known, by index."""
    found = {v.index: v for _, v in batched.results.values()}
    for v in _mentioned(batched):
        found[v.index] = v
    return found


def _mentioned(batched: BatchedProgram) -> Iterator[V]:
    yield from batched.outputs
    for call in (*batched.fixed, *batched.chunk):
        yield from values((call.args, tuple(v for _, v in call.kwargs)))


def _touched(spec: Spec) -> int:
    """Bytes of the distinct elements: an expanded tensor is as large as its base."""
    extents = [n for n, s in zip(spec.shape, spec.stride, strict=True) if s or not n]
    return math.prod(extents) * spec.dtype.itemsize
