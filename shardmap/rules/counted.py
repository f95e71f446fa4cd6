"""Batching rules for results whose shape depends on values: `x[mask]`, `nonzero`, `masked_select`.

The samples of a chunk have been sorted so that all of them select as many elements: one call on the
whole batch selects them in order, and the result is cut into samples. Replay checks that they do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.autograd.function import FunctionCtx

from shardmap import errors
from shardmap._torch import (
    OpOverload,
    aten,
    dispatch_depth,
    forward_ad,
    forward_level,
    functorch,
)
from shardmap.program.ir import Equation
from shardmap.program.questions import begins
from shardmap.rules.counting import counts
from shardmap.rules.ctc import ctc_loss
from shardmap.rules.lowering import B, Lowering, V, arguments
from shardmap.rules.promote import expanded

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
    if rule is None:
        return NotImplemented
    if kwargs:
        args = tuple(arguments(eq, args, kwargs).values())
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
    if not mask.mapped:
        return NotImplemented
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    if not shape:
        return _selected(b, eq, b.view(x, (1,)), b.view(mask, (1,)), call)
    if x.shape != mask.shape:
        x, mask = expanded(b, x, shape), expanded(b, mask, shape)
    return _selected(b, eq, x, mask, call)


def _index(b: Lowering, eq: Equation, args: Any, call: str) -> Any:
    x, indices = args
    given = [(at, index) for at, index in enumerate(indices) if index is not None]
    lead, mask = given[0]
    if len(given) > 1 or mask.dtype not in MASKS or not mask.mapped or not mask.ndim:
        return NotImplemented
    return _selected(b, eq, x, mask, call, lead)


def _selected(b: Lowering, eq: Equation, x: V, mask: V, call: str, lead: int = 0) -> Any:
    spec = eq.outs[0].spec
    if mask.dtype != torch.bool:
        mask = b.cast(mask, torch.bool)
    return b.call(
        select_rows, B, b.batch(x), mask, spec.shape[lead], lead, call,
        shape=spec.shape, dtype=spec.dtype,
    )  # fmt: skip


def _repeat(b: Lowering, eq: Equation, args: Any, call: str) -> Any:
    spec, repeats = eq.outs[0].spec, args[0]
    return b.call(repeat_rows, B, repeats, spec.shape[0], call, shape=spec.shape, dtype=spec.dtype)


def _bincount(b: Lowering, eq: Equation, args: Any, call: str) -> Any:
    named, spec = arguments(eq, args, {}), eq.outs[0].spec
    x, weights, least = named["self"], named["weights"], named["minlength"]
    rows = b.batch(x), None if weights is None else b.batch(weights)
    rest = spec.shape[0], least, spec.dtype, call
    return b.call(bincount_rows, *rows, *rest, shape=spec.shape, dtype=spec.dtype)


def _unique(b: Lowering, eq: Equation, args: Any, call: str) -> Any:
    named, spec = arguments(eq, args, {}), eq.outs[0].spec
    x, sort = named["self"], eq.op is not aten.unique_consecutive.default
    if named.get("dim") is not None or not x.numel:
        return NotImplemented
    kept = tuple([o.spec.shape != (0,) for o in eq.outs])
    outs = b.calls_several(unique_rows, 3, x, spec.shape[0], sort, (*kept, False)[:3], call)
    return outs[: len(kept)]


def _ctc(b: Lowering, eq: Equation, args: Any, call: str) -> Any:
    lengths, longest = args[3], eq.outs[1].spec.shape[2] // 2
    checked = b.call(
        same_longest, lengths, longest, call, shape=lengths.shape, dtype=lengths.dtype
    )  # fmt: skip
    return ctc_loss(b, eq, (*args[:3], checked, *args[4:]), {})


_RULES: dict[OpOverload, Callable[[Lowering, Equation, Any, str], Any]] = {
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _select,
    aten.index.Tensor: _index,
    aten.repeat_interleave.Tensor: _repeat,
    aten.bincount.default: _bincount,
    aten._unique.default: _unique,
    aten._unique2.default: _unique,
    aten.unique_consecutive.default: _unique,
    aten._ctc_loss.Tensor: _ctc,
}


def nonzero_rows(size: int, x: torch.Tensor, count: int, call: str) -> torch.Tensor:
    """The positions of each sample's nonzero elements, `[size, count, dimensions]`."""
    _same_count(x, count, "nonzero", call)
    return x.nonzero()[:, 1:].reshape(size, count, x.ndim - 1)


def select_rows(
    size: int, x: torch.Tensor, mask: torch.Tensor, count: int, lead: int, call: str
) -> torch.Tensor:
    """Each sample's elements where its mask is true, `[size, *lead, count, ...]`.

    The mask is one of the dimensions behind the first `lead` ones.
    """
    _same_count(mask, count, "a selection by a mask", call)
    x = _mask_in_front(x, mask, lead)
    return x[mask].reshape(size, count, *x.shape[mask.ndim :]).movedim(1, 1 + lead)


def _mask_in_front(x: torch.Tensor, mask: torch.Tensor, lead: int) -> torch.Tensor:
    """A view with the mask's dimensions right behind that of the samples."""
    dims = range(1 + lead, lead + mask.ndim)
    return x.movedim(tuple(dims), tuple(range(1, mask.ndim))) if lead else x


def repeat_rows(size: int, repeats: torch.Tensor, count: int, call: str) -> torch.Tensor:
    """The repeated indices of each sample, `[size, count]`."""
    sums = repeats.sum(1)
    if bool((sums != count).any()):
        raise _varies("repeat_interleave", count, call)
    numbers = torch.repeat_interleave(repeats.reshape(-1))
    return (numbers % max(repeats.shape[1], 1)).reshape(size, count)


def bincount_rows(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    count: int,
    least: int,
    dtype: torch.dtype,
    call: str,
) -> torch.Tensor:
    """The number of each sample's elements of each value: `[size, n] -> [size, count]`."""
    if x.numel():
        if bool((x < 0).any()):
            aten.bincount(x[(x < 0).any(1)][0])  # raises
        if bool(((x.amax(1) + 1).clamp(min=least) != count).any()):
            raise _varies("bincount", count, call)
    elif len(x) and least != count:
        raise _varies("bincount", count, call)
    if weights is not None:
        weights = weights.detach().to(dtype)
    return counts(x.to(torch.int64), count, weights).to(dtype)


class _Underivable(torch.autograd.Function):
    """Values that are computed from `x` and have no derivative: the errors are torch's own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
        ctx.operator = inputs[2]  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> NoReturn:
        name = ctx.operator  # pyright: ignore[reportAttributeAccessIssue]
        raise NotImplementedError(f"the derivative for '{name}' is not implemented.")

    @staticmethod
    def jvp(ctx: FunctionCtx, *tangents: torch.Tensor) -> NoReturn:
        name = ctx.operator  # pyright: ignore[reportAttributeAccessIssue]
        raise NotImplementedError(
            f"Trying to use forward AD with {name} that does not support it because it has not "
            "been implemented yet."
        )


def unique_rows(
    x: torch.Tensor, count: int, sort: bool, kept: tuple[bool, ...], call: str
) -> tuple[torch.Tensor, ...]:
    """The distinct elements of each sample, their places among those, and their numbers.

    Args:
        x: The samples.
        count: Number of distinct elements of each.
        sort: True to sort them; False to tell only neighbours apart.
        kept: For each result: True if it is asked for.
        call: The user's call, for errors.
    """
    flat = x.reshape(x.shape[0], -1) if x.numel() else x.flatten(1)
    order = None
    if sort:
        flat, order = flat.sort(dim=1, stable=True)
    first = begins(flat)
    rank = first.cumsum(1) - 1
    if x.numel() and bool((rank[:, -1] + 1 != count).any()):
        raise _varies("unique", count, call)
    at = torch.where(first, rank, count)
    inside = functorch.peek_interpreter_stack() is not None or forward_level(forward_ad) >= 0
    # A map around this one would record the backward, which raises, where nobody asks for it.
    asked = (x.requires_grad or inside) and not dispatch_depth()
    values = flat.new_zeros(flat.shape[0], count + 1)
    values = values.scatter(1, at, flat.detach() if asked else flat)[:, :count]
    if asked:
        values = _Underivable.apply(values, x, "_unique2" if sort else "unique_consecutive")
    nothing = rank.new_empty(flat.shape[0], 0)
    places = rank if order is None else torch.zeros_like(rank).scatter(1, order, rank)
    numbers = counts(rank, count) if kept[2] else nothing
    return values.contiguous(), places.view(x.shape) if kept[1] else nothing, numbers


def same_longest(lengths: torch.Tensor, longest: int, call: str) -> torch.Tensor:
    """The lengths of each sample's targets, of which the longest is `longest`."""
    if lengths.numel() and bool((lengths.reshape(len(lengths), -1).amax(1) != longest).any()):
        raise _varies("ctc_loss", longest, call)
    return lengths.view_as(lengths)


def put_rows(
    x: torch.Tensor,
    mask: torch.Tensor,
    source: torch.Tensor,
    accumulate: bool,
    lead: int,
    call: str,
) -> torch.Tensor:
    """Write each sample's values where its mask is true; `source` is `[size, *lead, count, ...]`.

    Dimensions of `source` before and behind the count may be ones.
    """
    count = source.shape[1 + lead]
    _same_count(mask, count, "a selection by a mask", call)
    into = _mask_in_front(x, mask, lead)
    rest = into.shape[mask.ndim :]
    values = source.movedim(1 + lead, 1).expand(len(x), count, *rest)
    aten.index_put_(into, [mask], values.reshape(-1, *rest), accumulate)
    return x


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
