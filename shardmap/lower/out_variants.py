"""Variants of calls that write their result into existing memory.

A chunk's results belong in their slices of one preallocated output. Where the last call of an
output can write there itself (`out=`), nothing is computed into memory of its own first and copied:
for the per-sample gradients of a layer, which are larger than anything else in the program, that
copy costs as much as computing them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from shardmap._torch import OpOverload, has_kernel, kernel_of, schema_of
from shardmap.program.operators import op_info
from shardmap.rules import huge_pages as pages
from shardmap.rules.conv_weights import PatchProducts
from shardmap.rules.embedding import scatter_rows, scatter_rows_into
from shardmap.rules.lowering import Call
from shardmap.rules.operator_loop import OperatorLoop


def _mul(column: torch.Tensor, row: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.mul(column, row, out=out)


def _bmm(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x, y, out=out)


def _zeros(like: torch.Tensor, shape: Any, out: torch.Tensor) -> torch.Tensor:
    return out.zero_()


_OURS: dict[Any, Callable[..., torch.Tensor]] = {
    pages.mul: _mul,
    pages.bmm: _bmm,
    pages.zeros: _zeros,
    scatter_rows: scatter_rows_into,
}


def into(call: Call) -> Callable[..., torch.Tensor] | None:
    """The function that computes `call` into an argument `out` of the result's shape and dtype.

    None if there is none.

    It is only for memory that no argument shares, and must not run under autograd.
    """
    if call.several or len(call.outs) != 1 or call.writes or not call.mapped:
        return None
    if call.op is not None:
        found = _overload(call.op)
        return None if found is None else kernel_of(found)
    if isinstance(call.target, PatchProducts | OperatorLoop):
        return call.target.into
    return _OURS.get(call.target)


@functools.cache
def _overload(op: OpOverload) -> OpOverload | None:
    """The variant of `op` with the same arguments and one more, `out`."""
    schema = schema_of(op)
    if len(schema.returns) != 1 or str(schema.returns[0].type) != "Tensor" or op_info(op).random:
        return None
    if any(a.alias_info is not None for a in (*schema.arguments, *schema.returns)):
        return None  # a view, or a write
    if has_kernel(op.name(), "CompositeImplicitAutograd"):
        return None  # may be a view or a copy, whichever fits: its variant copies
    wanted = [(a.name, str(a.type)) for a in schema.arguments]
    for name in op.overloadpacket.overloads():
        candidate = getattr(op.overloadpacket, name)
        arguments = schema_of(candidate).arguments
        extra = [a for a in arguments if a.is_out]
        if (
            len(extra) == 1
            and extra[0].name == "out"
            and [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted
        ):
            return candidate
    return None
