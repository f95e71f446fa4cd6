"""Drop the calls and the results that a batched program does not need."""

from __future__ import annotations

from shardmap.rules.lowering import Call, V, values
from shardmap.rules.operator_loop import OperatorLoop


def drop_dead(
    calls: list[Call], outputs: tuple[V, ...]
) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """Split the calls that lead to an output or have an effect into fixed ones and the chunk's."""
    used = {v.index for v in outputs}
    kept = []
    for call in reversed(calls):
        if not call.outs or call.writes or any(o in used for o in call.outs):
            kept.append(_only_used(call, used))
            used.update(v.index for v in values((call.args, tuple(v for _, v in call.kwargs))))
    kept.reverse()
    return tuple(c for c in kept if not c.mapped), tuple(c for c in kept if c.mapped)


def _only_used(call: Call, used: set[int]) -> Call:
    """The call, without the results of a loop that nothing uses: stacking them takes time."""
    wanted = [o in used for o in call.outs]
    if not call.several or all(wanted) or not isinstance(call.target, OperatorLoop):
        return call
    outs = tuple([o if o in used else None for o in call.outs])
    return call._replace(target=call.target.only(wanted), outs=outs)
