"""Pointwise calls that compute into an operand which nothing reads afterwards.

A result of its own needs memory that is not in the cache: on [64, 40, 40] an addition took 27 us,
and 16 in place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from shardmap._torch import aten
from shardmap.lower.uses import Results, fresh, makers, reads
from shardmap.rules.lowering import Call, V

LEAST_ELEMENTS = 256
"""Least elements per sample of a value that is worth it."""

_TWO = {
    aten.add.Tensor: torch.Tensor.add_,
    aten.sub.Tensor: torch.Tensor.sub_,
    aten.mul.Tensor: torch.Tensor.mul_,
    aten.div.Tensor: torch.Tensor.div_,
    aten.mul.Scalar: torch.Tensor.mul_,
    aten.add.Scalar: torch.Tensor.add_,
}
"""Operators of one tensor and a second operand: the method that writes to the first."""

_ONE = {
    getattr(aten, name).default: getattr(torch.Tensor, f"{name}_")
    for name in ("neg", "tanh", "exp", "sigmoid", "relu", "sin", "cos", "sqrt", "reciprocal")
}

_EITHER = (aten.add.Tensor, aten.mul.Tensor)
"""Operators whose operands can be exchanged without a change of the result."""

_FLOATS = (torch.float32, torch.float64)


def in_place(calls: Sequence[Call], kept: Collection[int], results: Results) -> list[Call]:
    """Compute pointwise results into operands that are read for the last time.

    Args:
        calls: The calls of a chunk.
        kept: Indices of the outputs.
        results: For a value's index: the recorded tensor that it is the batch of, whose strides
            tell its layout.
    """
    made = makers(calls)
    last: dict[int, int] = {}
    shared = set(kept)
    for i, call in enumerate(calls):
        own = fresh(call)
        for v in reads(call):
            last[v.index] = i
            if not own:
                shared.add(v.index)
        if not own or call.several:
            shared.update(o for o in call.outs if o is not None)
    joined = {v.index for call in calls if call.op in _JOINS for v in reads(call)}
    found = []
    for i, call in enumerate(calls):
        out = call.outs[0] if len(call.outs) == 1 and not call.several else None
        if out is None or out in kept or out in joined or call.writes or not call.mapped:
            found.append(call)
            continue
        found.append(_written(call, out, i, last, shared, made, results))
    return found


_JOINS = (aten.stack.default, aten.cat.default)


def _written(
    call: Call,
    out: int,
    number: int,
    last: dict[int, int],
    shared: set[int],
    made: dict[int, Call],
    results: Results,
) -> Call:
    """The call in place if an operand allows it, or the call itself."""

    def free(v: object) -> bool:
        return (
            type(v) is V
            and v.mapped
            and v.index in made
            and v.index not in shared
            and last[v.index] == number
            and _alike(v, out, results)
        )

    op, args = call.op, call.args
    if call.kwargs or op is None:
        return call
    if op in _ONE and len(args) == 1 and free(args[0]):
        return _in(call, _ONE[op], args)
    if op not in _TWO or len(args) != 2:
        return call
    x, y = args
    if type(y) is V and type(x) is V and (x.dtype != y.dtype or x.index == y.index):
        return call
    if free(x):
        return _in(call, _TWO[op], args)
    if op in _EITHER and free(y) and type(x) is V:
        return _in(call, _TWO[op], (y, x))
    return call


def _in(call: Call, method: object, args: tuple[object, ...]) -> Call:
    assert callable(method)
    return call._replace(target=method, args=args, op=None)


def _alike(v: V, out: int, results: Results) -> bool:
    """True if a value and a result have the same shape, dtype and layout."""
    if v.index not in results or out not in results:
        return False
    a, b = results[v.index][0].spec, results[out][0].spec
    return (
        (a.shape, a.stride, a.dtype) == (b.shape, b.stride, b.dtype)
        and a.dtype in _FLOATS
        and v.numel >= LEAST_ELEMENTS
    )
