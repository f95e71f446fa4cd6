"""Batching rules of the CTC loss: the samples of the map join those of the loss's own batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules.lowering import B, Given, Lowering, Named, V, arguments
from shardmap.rules.registry import register


def _by_time(t: Tensor) -> Tensor:
    """Join two batches behind the time: `[B, T, n, ...] -> [T, B * n, ...]`."""
    return t.movedim(0, 1).flatten(1, 2)


def _lengths(given: Any, size: int, mapped: bool) -> Any:
    """The lengths of each of `size` batches: of shared ones, repeated."""
    if not isinstance(given, Tensor):
        return [int(n) for n in given] * size
    return given.flatten() if mapped else given.flatten().repeat(size)


def _mapped(a: dict[str, Any]) -> tuple[bool, bool]:
    """Tell whether the lengths of the inputs, and those of the targets, differ by sample."""
    inputs, targets = a["input_lengths"], a["target_lengths"]
    return type(inputs) is V and inputs.mapped, type(targets) is V and targets.mapped


@register("losses", aten._ctc_loss.default, aten._ctc_loss.Tensor)
def ctc_loss(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the loss, and the table of sums that its backward reads.

    The longest targets of each sample, and with them the table's shape, are the recorded ones:
    `shardmap.rules.counted` sees to that where lengths differ by sample.
    """
    a = arguments(eq, args, kwargs)
    if a["log_probs"].ndim != 3:
        return NotImplemented
    apart = _mapped(a)
    op, tail, specs = eq.op, (a["blank"], a["zero_infinity"]), [o.spec for o in eq.outs]

    def loss(
        size: int, probabilities: Tensor, targets: Tensor, inputs: Any, lengths: Any
    ) -> tuple[Tensor, ...]:
        if not size:
            return tuple([probabilities.new_empty((0, *s.shape), dtype=s.dtype) for s in specs])
        joined = _by_time(probabilities), targets.flatten(0, 1).contiguous()
        each = _lengths(inputs, size, apart[0]), _lengths(lengths, size, apart[1])
        found = op(*joined, *each, *tail)
        return tuple([t.view(size, *s.shape) for t, s in zip(found, specs, strict=True)])

    given = b.batch(a["log_probs"]), b.batch(a["targets"])
    return b.calls_several(loss, 2, B, *given, a["input_lengths"], a["target_lengths"])


@register("losses", aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor)
def ctc_loss_backward(b: Lowering, eq: Equation, args: Given, kwargs: Named) -> object:
    """Batch the gradient by the logarithms of the probabilities."""
    a = arguments(eq, args, kwargs)
    if a["log_probs"].ndim != 3:
        return NotImplemented
    apart = _mapped(a)
    op, tail, spec = eq.op, (a["blank"], a["zero_infinity"]), eq.outs[0].spec

    def backward(
        size: int,
        grad: Tensor,
        probabilities: Tensor,
        targets: Tensor,
        found: Tensor,
        table: Tensor,
        inputs: Any,
        lengths: Any,
    ) -> Tensor:
        if not size:
            return probabilities.new_empty((0, *spec.shape))
        flat = [t.flatten(0, 1).contiguous() for t in (targets, found, table)]
        each = _lengths(inputs, size, apart[0]), _lengths(lengths, size, apart[1])
        out = op(
            grad.flatten().contiguous(), _by_time(probabilities).contiguous(), flat[0], *each,
            *flat[1:], *tail,
        )  # fmt: skip
        return out.unflatten(1, (size, -1)).movedim(1, 0).contiguous()

    names = "grad", "log_probs", "targets", "neg_log_likelihood", "log_alpha"
    given = [b.batch(a[n]) for n in names]
    rest = a["input_lengths"], a["target_lengths"]
    return b.call(backward, B, *given, *rest, shape=spec.shape, dtype=spec.dtype)
