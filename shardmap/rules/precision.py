"""The precision in which a kernel uses a number whose dtype differs from the other tensor's.

A tensor without dimensions counts less in promotion than others do: `float16 [n] / float32 []`
is float16. Some kernels round the number to float16 first, others compute in float32 and round the
result: 1e-3 / 70000. is 0 in the one and 1.4e-8 in the other. In a batch the number has a
dimension, so that one of the two must be chosen. It is found by calls of the kernel itself, once
per operator and dtypes, with values that the narrower dtype cannot hold.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from shardmap._torch import modes_aside, without_functorch
from shardmap.rules.registry import Operator

_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
"""The dtype in which kernels compute, where it is not the operands' own."""

_NUMBERS = (1 / 3, 70000.7, 1e-6, -2.1, 2049.0, 1.0, 300.2, 1e39)
"""Numbers that a narrower dtype rounds, overflows or loses."""

_LENGTH = 67
"""Number of elements of a probe: some go through vectorised code, some through its remainder."""


class Operand(NamedTuple):
    """The facts about a tensor operand that promotion depends on."""

    dtype: torch.dtype
    number: bool
    """True if the sample's operand has no dimensions."""
    promotes: bool = True
    """True if it takes part in promotion; the condition of `where` does not."""


def computation_dtype(
    op: Operator,
    operands: tuple[Operand, ...],
    arguments: tuple[Any, ...],
    named: tuple[tuple[str, Any], ...],
    common: torch.dtype,
    device: str,
) -> torch.dtype | None:
    """The dtype to cast operands to, so that a batched call computes what the sample's call does.

    Args:
        op: An operator that computes each element by itself, not one that writes to its operand.
        operands: Its tensor operands that take part in promotion, in order.
        arguments: Its positional arguments, with a `Slot` in the place of each operand.
        named: Its keyword arguments.
        common: The dtype to which the operands promote.
        device: Kind of device that the sample's call ran on.

    Returns:
        `common`, or a wider dtype from which the result is to be rounded; None if the kernel agrees
        with neither.
    """
    return _probe(op, operands, arguments, named, common, device)


class Slot(NamedTuple):
    """Placeholder for an operand among the arguments of a probe."""

    operand: int


@functools.lru_cache(4096)
def _probe(
    op: Operator,
    operands: tuple[Operand, ...],
    arguments: tuple[Any, ...],
    named: tuple[tuple[str, Any], ...],
    common: torch.dtype,
    device: str,
) -> torch.dtype | None:
    candidates = [common, *([_WIDER[common]] if common in _WIDER else [])]
    exact, close, asked = set(candidates), set(candidates), 0
    with torch.no_grad(), modes_aside(), without_functorch():
        for number in _NUMBERS:
            tensors = [_values(o, number, i, device) for i, o in enumerate(operands)]
            want = _answer(op, tensors, arguments, named)
            if want is None:
                continue  # such as an integer shifted by more bits than it has
            asked += 1
            for dtype in candidates:
                batch = [
                    _batch(t, dtype if o.promotes else o.dtype)
                    for t, o in zip(tensors, operands, strict=True)
                ]
                got = _answer(op, batch, arguments, named)
                if got is not None:
                    got = got.to(want.dtype)[0]
                if got is None or not _close(got, want, 0.0):
                    exact.discard(dtype)
                if got is None or not _close(got, want, 4.0):
                    close.discard(dtype)
    if not asked:
        return None
    return next((d for found in (exact, close) for d in candidates if d in found), None)


def _answer(
    op: Operator,
    tensors: list[torch.Tensor],
    arguments: tuple[Any, ...],
    named: tuple[tuple[str, Any], ...],
) -> torch.Tensor | None:
    """Run the kernel on `tensors`; None if it refuses them."""

    def filled(a: Any) -> Any:
        return tensors[a.operand] if type(a) is Slot else a

    try:
        return op(*map(filled, arguments), **{k: filled(a) for k, a in named})
    except (RuntimeError, ArithmeticError):
        return None


def _values(operand: Operand, number: float, position: int, device: str) -> torch.Tensor:
    """Make an operand of a probe: `number` itself, or a row of values of every size."""
    dtype, wide = operand.dtype, torch.float64
    if operand.number:
        value = torch.tensor(number, dtype=wide)
    else:
        steps = torch.arange(_LENGTH, dtype=wide)
        value = (steps - 20 * (1 + position)) * 0.37 * 10 ** (steps % 5 - 3)
    if not (dtype.is_floating_point or dtype.is_complex):
        bits = torch.iinfo(dtype) if dtype is not torch.bool else None
        value = value.round()
        value = torch.where(value == 0, 1.0, value)  # integers are not divided by zero
        if bits is None:
            value = value > 0
        elif not operand.number:
            value = value.clamp(max(bits.min, -100), min(bits.max, 100))
        else:
            value = value.clamp(max(bits.min, -(2**40)), min(bits.max, 2**40))
    return value.to(dtype).to(device)


def _batch(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Two equal samples in another dtype, as a rule passes them to the kernel."""
    t = t.to(dtype)
    return t.view(1, 1).expand(2, 1) if t.dim() == 0 else t.expand(2, *t.shape)


def _close(got: torch.Tensor, want: torch.Tensor, units: float) -> bool:
    """True if two results differ by at most some units in the last place; NaN equals NaN."""
    inexact = want.is_floating_point() or want.is_complex()
    eps = torch.finfo(want.dtype).eps if inexact else 0.0
    wide = torch.complex128 if want.is_complex() else torch.float64 if inexact else want.dtype
    return torch.allclose(
        got.to(wide), want.to(wide), rtol=units * eps, atol=0.0, equal_nan=inexact
    )
