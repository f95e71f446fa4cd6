"""Facts about batched calls that several passes over them need."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import torch

from shardmap._torch import schema_of
from shardmap.program.ir import Var
from shardmap.program.operators import op_info
from shardmap.rules import huge_pages as pages
from shardmap.rules.lowering import Call, V, values
from shardmap.rules.reduce import safe_softmax

Results = Mapping[int, tuple[Var, V]]
"""For a value's index: the recorded tensor that it is the batch of."""

_FRESH = (torch.matmul, torch.nn.functional.linear, pages.mul, pages.bmm, safe_softmax)
"""Functions that are no operators, and whose result has memory of its own."""


def reads(call: Call) -> list[V]:
    """The values that a call reads, in the order of its arguments."""
    return list(values((call.args, tuple([v for _, v in call.kwargs]))))


def uses(calls: Sequence[Call]) -> collections.Counter[int]:
    """How often each value is read."""
    return collections.Counter(v.index for call in calls for v in reads(call))


def makers(calls: Sequence[Call]) -> dict[int, Call]:
    """For each value, the call that makes it."""
    return {o: call for call in calls for o in call.outs if o is not None}


def fresh(call: Call) -> bool:
    """True if a call is sure to put all its results into memory of their own."""
    if call.writes:
        return False
    if call.op is None:
        return any(call.target is f for f in _FRESH)
    if op_info(call.op).composite or call.op.name() in ("aten::_unsafe_view", "aten::contiguous"):
        return False
    return all(r.alias_info is None for r in schema_of(call.op).returns)


def renamed(call: Call, names: Mapping[int, V]) -> Call:
    """The call with some of its arguments replaced by other values."""
    if not names or not any(v.index in names for v in reads(call)):
        return call

    def new(value: object) -> object:
        if type(value) is V:
            other = names.get(value.index)
            return value if other is None else value._replace(index=other.index)
        if type(value) is list or type(value) is tuple:
            return type(value)([new(v) for v in value])
        return value

    return call._replace(
        args=tuple([new(a) for a in call.args]), kwargs=tuple([(k, new(v)) for k, v in call.kwargs])
    )


def written_memory(calls: Sequence[Call]) -> set[int]:
    """The values whose memory is written after a first call has read them, or may be.

    Values that a chunk is given may share memory among each other.
    """
    block: dict[int, int] = {}
    """For each value a number of the block of memory that it lies in; 0 for what is given."""
    joined: dict[int, int] = {}

    def root(number: int) -> int:
        while number in joined:
            number = joined[number]
        return number

    read_at: dict[int, int] = {}
    for i, call in enumerate(calls):
        own = fresh(call)
        around = {root(block.setdefault(v.index, 0)) for v in reads(call)} if not own else set()
        number = min(around, default=i + 1)
        for other in around - {number}:
            joined[other] = number
        for o in call.outs:
            if o is not None:
                block[o] = number
        for v in reads(call):
            block.setdefault(v.index, 0)
            read_at.setdefault(v.index, i)
    written: dict[int, int] = {}
    for i, call in enumerate(calls):
        if call.writes:
            for v in reads(call):
                written[root(block[v.index])] = i
    return {v for v, i in read_at.items() if v in block and written.get(root(block[v]), -1) > i}
