"""Check the results of a rule where they are bound to the recorded ones."""

from __future__ import annotations

from typing import Any

from shardmap import errors
from shardmap.program.ir import Equation, Var
from shardmap.rules.lowering import V


def bound(eq: Equation, returned: Any) -> list[V | None]:
    """Bind the results of a rule, one for each tensor that the recorded call returned.

    Args:
        eq: The recorded call.
        returned: The rule's result: a `V`, a tuple of them, or None if all results are
            arguments that the call wrote to. A tuple may hold None for such a result, and for a
            result that the recorded call did not return.

    Returns:
        A `V` for each of `eq.results()`; None for an argument that was written to.

    Raises:
        RuleError: The result has another type, or another number of tensors.
    """
    outs = list(eq.results())
    if returned is None:
        found: list[V | None] = [None] * len(outs)
    else:
        found = _flat(eq, returned)
    if len(found) != len(outs) and len(found) == len(eq.outs):
        pairs = zip(found, eq.outs, strict=True)
        found = [v for v, out in pairs if out is not None]
    if len(found) != len(outs):
        raise _wrong(eq, f"{len(found)} result{'s' * (len(found) != 1)}")
    arguments = {v.index for v in eq.inputs()}
    for number, (var, v) in enumerate(zip(outs, found, strict=True)):
        if v is None and var.index not in arguments:
            what = "nothing" if returned is None else f"None as result {number}"
            raise _wrong(eq, what)
    return found


def _flat(eq: Equation, returned: Any) -> list[V | None]:
    """The values in nested tuples and lists."""
    if type(returned) is V:
        return [returned]
    if type(returned) not in (tuple, list):
        raise _wrong(eq, _shown(returned))
    found: list[V | None] = []
    for item in returned:
        found += [None] if item is None else _flat(eq, item)
    return found


def _shown(value: Any) -> str:
    """Text about a value that is no `V`."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    return f"{value!r} (a {type(value).__name__})"


def _wrong(eq: Equation, returned: str) -> errors.RuleError:
    """The error for a rule that returned `returned`."""
    name = eq.op.name()
    specs = [out.spec for out in eq.outs if type(out) is Var]
    shapes = ", ".join(f"[B{''.join(f', {n}' for n in s.shape)}] {s.dtype}" for s in specs)
    count = len(list(eq.results()))
    if not count:
        expected = "None, because the call has no results"
    elif count == 1:
        expected = f"the V of its result, which holds {shapes} at replay"
    else:
        expected = f"a tuple of {count} V, one for each result ({shapes} at replay)"
    return errors.RuleError(
        f"the batching rule of {name} returned {returned}, not {expected}; a rule returns what "
        "b.call(...) or b.calls_several(...) gave it, None for a call that only writes to its "
        "arguments, or NotImplemented to leave the call to the next tier"
    )
