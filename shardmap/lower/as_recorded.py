"""Emit recorded calls unchanged, and drop the calls that a batched program does not need."""

from __future__ import annotations

from typing import Any

from shardmap._torch import schema_of
from shardmap.program.ir import Equation
from shardmap.rules.lowering import Call, Lowering, V, values
from shardmap.rules.operator_loop import OperatorLoop


def functional_call(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Emit a recorded call unchanged."""
    returns = schema_of(eq.op).returns
    if not returns or not list(eq.results()):
        b.effect(eq.op, *args, **kwargs)
        return None
    if len(returns) == 1 and str(returns[0].type) == "Tensor":
        return b.call(eq.op, *args, named=kwargs)
    outs: list[Any] = []
    if any(type(o) is tuple for o in eq.outs):

        def flat(*a: Any, **k: Any) -> Any:
            return tuple(_flat(eq.op(*a, **k)))

        return b.calls_several(flat, len(list(eq.results())), *args, **kwargs)
    got = iter(b.calls_several(eq.op, len(eq.outs), *args, **kwargs))
    outs = [next(got) for _ in eq.outs]
    return [v for v, o in zip(outs, eq.outs, strict=True) if o is not None]


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


def _flat(result: Any) -> Any:
    for item in result:
        if isinstance(item, tuple | list):
            yield from _flat(item)
        else:
            yield item
