"""Batching rules for results whose shape depends on values: `x[mask]`, `nonzero`, `masked_select`.

The samples of a chunk have been sorted so that all of them select as many elements: one call on the
whole batch selects them in order, and the result is cut into samples. Replay checks that they do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import OpOverload, aten
from shardmap.program.ir import Equation
from shardmap.rules.lowering import B, Lowering, V

MASKS = (torch.bool, torch.uint8)


def counted(b: Lowering, eq: Equation, args: Any, kwargs: Any, call: str) -> Any:
    """Batch a call whose result has the recorded shape for each sample; NotImplemented if unknown.

    Args:
        b: The builder.
        eq: The recorded call.
        args: Its arguments, batched.
        kwargs: Its keyword arguments, batched.
        call: The user's call, for errors.
    """
    rule = _RULES.get(eq.op)
    if rule is None or kwargs:
        return NotImplemented
    return rule(b, eq, args, call)


def refuse_traced(name: str, call: str) -> None:
    """Refuse a result whose shape depends on values in a trace, which has no values."""
    raise errors.DataDependentError(
        f"{call}: the shape of {name}'s result depends on values, which a trace does not have; use "
        "torch.where or masks"
    )


def _nonzero(b: Lowering, eq: Equation, args: Any, call: str) -> Any:
    spec = eq.outs[0].spec
    return b.call(nonzero_rows, B, args[0], spec.shape[0], call, shape=spec.shape, dtype=spec.dtype)


def _select(b: Lowering, eq: Equation, args: Any, call: str) -> Any:
    x, mask = args
    if x.shape != mask.shape or not mask.mapped:
        return NotImplemented
    return _selected(b, eq, x, mask, call)


def _index(b: Lowering, eq: Equation, args: Any, call: str) -> Any:
    x, indices = args
    mask = indices[0]
    others = any(i is not None for i in indices[1:])
    if mask is None or others or mask.dtype not in MASKS or not mask.mapped or not mask.ndim:
        return NotImplemented
    return _selected(b, eq, x, mask, call)


def _selected(b: Lowering, eq: Equation, x: V, mask: V, call: str) -> Any:
    spec = eq.outs[0].spec
    if mask.dtype != torch.bool:
        mask = b.cast(mask, torch.bool)
    return b.call(
        select_rows, B, b.batch(x), mask, spec.shape[0], call, shape=spec.shape, dtype=spec.dtype
    )


def _repeat(b: Lowering, eq: Equation, args: Any, call: str) -> Any:
    spec, repeats = eq.outs[0].spec, args[0]
    return b.call(repeat_rows, B, repeats, spec.shape[0], call, shape=spec.shape, dtype=spec.dtype)


_RULES: dict[OpOverload, Callable[[Lowering, Equation, Any, str], Any]] = {
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _select,
    aten.index.Tensor: _index,
    aten.repeat_interleave.Tensor: _repeat,
}


def nonzero_rows(size: int, x: torch.Tensor, count: int, call: str) -> torch.Tensor:
    """The positions of each sample's nonzero elements, `[size, count, dimensions]`."""
    _same_count(x, count, "nonzero", call)
    return x.nonzero()[:, 1:].reshape(size, count, x.ndim - 1)


def select_rows(
    size: int, x: torch.Tensor, mask: torch.Tensor, count: int, call: str
) -> torch.Tensor:
    """Each sample's elements where its mask is true, `[size, count, ...]`."""
    _same_count(mask, count, "a selection by a mask", call)
    return x[mask].reshape(size, count, *x.shape[mask.ndim :])


def repeat_rows(size: int, repeats: torch.Tensor, count: int, call: str) -> torch.Tensor:
    """The repeated indices of each sample, `[size, count]`."""
    sums = repeats.sum(1)
    if bool((sums != count).any()):
        raise _varies("repeat_interleave", count, call)
    numbers = torch.repeat_interleave(repeats.reshape(-1))
    return (numbers % max(repeats.shape[1], 1)).reshape(size, count)


def put_rows(
    x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor, accumulate: bool, call: str
) -> torch.Tensor:
    """Write each sample's values where its mask is true; `source` is `[size, count, ...]`."""
    _same_count(mask, source.shape[1], "a selection by a mask", call)
    return aten.index_put_(x, [mask], source.reshape(-1, *source.shape[2:]), accumulate)


def _same_count(mask: torch.Tensor, count: int, what: str, call: str) -> None:
    counts = mask.detach().reshape(mask.shape[0], -1).count_nonzero(1) if mask.numel() else None
    wrong = count != 0 and mask.shape[0] > 0 if counts is None else bool((counts != count).any())
    if wrong:
        raise _varies(what, count, call)


def _varies(what: str, count: int, call: str) -> errors.VariesError:
    return errors.VariesError(
        f"{call}: the shape of {what}'s result depends on values, and it has {count} elements for "
        "one sample but not for another; use torch.where, masks, or operators whose results have "
        "one shape"
    )
