"""Autocast around programs: their casts are recorded; a user's backward follows the state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from shardmap.program.ir import Equation, variables
from shardmap.program.operators import op_info
from shardmap.program.schema import short_name

_KINDS = ("cpu", "cuda")


def autocast_state(kind: str) -> str:
    """The dtype that autocast casts to on a kind of device in this thread; empty if it is off."""
    on = kind in _KINDS and torch.is_autocast_enabled(kind)
    return str(torch.get_autocast_dtype(kind)) if on else ""


@contextlib.contextmanager
def plain_numerics() -> Iterator[None]:
    """Switch autocast off during a replay: its casts have been recorded."""
    entered = [t for t in _KINDS if torch.is_autocast_enabled(t)]
    if not entered:
        yield
        return
    with contextlib.ExitStack() as stack:
        for t in entered:
            stack.enter_context(torch.autocast(t, enabled=False))
        yield


def is_cast_free(calls: Sequence[Equation]) -> bool:
    """True if autocast would change nothing in calls that were recorded while it was off.

    It never casts float64 numbers; of float32 ones it casts the operands of matrix products and
    the like, and what 16 bits meet.
    """
    held = [v for eq in calls for v in variables((eq.args, eq.kwargs, eq.outs))]
    kinds = {v.spec.dtype for v in held if v.spec.dtype.is_floating_point}
    if kinds <= {torch.float64}:
        return True
    return kinds <= {torch.float64, torch.float32} and all(
        op_info(eq.op).shape_only
        or torch.Tag.pointwise in eq.op.tags
        or torch.Tag.reduction in eq.op.tags
        or short_name(eq.op).partition(".")[0] in _NEVER_CAST
        for eq in calls
    )


_NEVER_CAST = frozenset(
    "view reshape _unsafe_view _reshape_alias t transpose permute expand squeeze unsqueeze clone "
    "alias detach _to_copy slice select narrow diagonal unfold contiguous lift_fresh as_strided "
    "zeros ones full empty scalar_tensor arange eye masked_fill index index_select gather scatter "
    "scatter_add cat stack flip roll tril triu cumsum copy_ fill_ zero_ data own_backward split "
    "split_with_sizes unbind chunk constant_pad_nd _local_scalar_dense item".split()
)
"""Operators without a tag that are no products."""
