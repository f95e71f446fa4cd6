"""A recorded call that is emitted as it is: no sample changes its arguments."""

from __future__ import annotations

from typing import Any

from shardmap._torch import schema_of
from shardmap.program.ir import Equation
from shardmap.rules.lowering import Lowering


def functional_call(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Emit a recorded call as it is."""
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


def _flat(result: Any) -> Any:
    for item in result:
        if isinstance(item, tuple | list):
            yield from _flat(item)
        else:
            yield item
