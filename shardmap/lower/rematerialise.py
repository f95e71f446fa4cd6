"""Rebuild large input-free constants in each chunk instead of keeping them alive.

Unit vectors, masks and zeros are quick to make and may be large: the rows of
an identity by which an output of 20,000 numbers is differentiated are 1.6 GB, 313 of them at a time
are 25 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shardmap.program.operators import op_info
from shardmap.rules import huge_pages as pages
from shardmap.rules.lowering import Call, V, values

FROM_BYTES = 1 << 20
"""Least size of a rebuilt value: making smaller ones again costs more than their memory is
worth."""

MANY_BYTES = 64 << 20
"""Total size from which memory freed in between is given back to the system."""


def postponed(
    fixed: Sequence[Call], chunk: Sequence[Call], outputs: Iterable[V]
) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """Move large input-free constants from the calls that run once to those of a chunk.

    Args:
        fixed: The calls that do not depend on the sample.
        chunk: The calls on whole chunks.
        outputs: The outputs of the program.
    """
    makers: dict[int, Call] = {}
    for call in fixed:
        if _repeatable(call) and all(v.index in makers for v in _arguments(call)):
            makers[call.outs[0] or 0] = call
    moved: set[int] = set()
    calls: list[Call] = []

    def make(v: V) -> None:
        if v.index in moved:
            return
        moved.add(v.index)
        for part in _arguments(makers[v.index]):
            make(part)
        calls.append(makers[v.index])

    for call in chunk:
        for v in _arguments(call):
            if v.index in makers and v.numel * v.dtype.itemsize >= FROM_BYTES:
                make(v)
        calls.append(call)
    if not moved:
        return _tidied(fixed), tuple(chunk)
    needed = {v.index for v in outputs} | {
        v.index for call in calls for v in _arguments(call) if v.index not in moved
    }
    kept = []
    for call in reversed(fixed):
        if (
            call.outs == ()
            or call.writes
            or not {o for o in call.outs if o is not None}.isdisjoint(needed)
        ):
            kept.append(call)
            needed.update(v.index for v in _arguments(call))
    return _tidied(kept[::-1]), _tidied(calls)


def _tidied(calls: Sequence[Call]) -> tuple[Call, ...]:
    """Give free memory back before each large input-free constant, if there are many."""
    sizes = {v.index: v.numel * v.dtype.itemsize for call in calls for v in _arguments(call)}
    makers = [
        i
        for i, call in enumerate(calls)
        if _repeatable(call) and not call.mapped and not _arguments(call)
    ]
    following = {i: 0 for i in makers}
    of_nothing: dict[int, int] = {}
    for i, call in enumerate(calls):
        sources = [of_nothing.get(v.index) for v in _arguments(call)]
        if i in following:
            of_nothing[call.outs[0] or 0] = i
        elif len(sources) == 1 and sources[0] is not None and _repeatable(call):
            of_nothing[call.outs[0] or 0] = sources[0]
    for index, i in of_nothing.items():
        following[i] = max(following[i], sizes.get(index, 0))
    if sum(following.values()) < MANY_BYTES:
        return tuple(calls)
    out: list[Call] = []
    for i, call in enumerate(calls):
        if following.get(i, 0) >= FROM_BYTES:
            out.append(
                Call(pages.give_back, (), (), (), False, call.grad, call.equation, False, False)
            )
        out.append(call)
    return tuple(out)


def _repeatable(call: Call) -> bool:
    """True if a call can be repeated at any time.

    It is an operator with one result that neither writes nor draws.
    """
    return (
        call.op is not None
        and len(call.outs) == 1
        and call.outs[0] is not None
        and not call.writes
        and not op_info(call.op).random
    )


def _arguments(call: Call) -> list[V]:
    return list(values((call.args, tuple(v for _, v in call.kwargs))))
