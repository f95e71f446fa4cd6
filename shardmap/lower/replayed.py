"""Functions that a lowering emits as calls beside operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import forward_ad, forward_level, functorch, is_view, schema_of
from shardmap.program.operators import CHECKS, SCALARS
from shardmap.program.schema import span
from shardmap.trace.recording import flat_tensors, is_empty_outside


def no_view(t: torch.Tensor) -> torch.Tensor:
    """`t` in memory of its own, for writing.

    A rule may return a view where the sample's call returned a new tensor.
    """
    return (
        restride(t.clone(), t.stride()[1:]) if is_view(t) else t
    )  # a clone closes the gaps between elements


def cut(t: torch.Tensor) -> torch.Tensor:
    """`t` as the sample's call saw it: detached from autograd.

    A tensor that does not require grad is returned itself: its views remain views.
    """
    return t.detach() if t.requires_grad else t


def data_of(t: torch.Tensor) -> torch.Tensor:
    """`t.data`: what is written to it is hidden from autograd."""
    return t.data


def fresh_leaf(t: torch.Tensor) -> torch.Tensor:
    """A leaf with the value of `t`: outer gradients end here, as they do in the loop."""
    return (
        t.detach()
        if functorch.peek_interpreter_stack() is not None
        else t.detach().requires_grad_()
    )


def copy(t: torch.Tensor) -> torch.Tensor:
    """A copy of `t` in memory of its own."""
    return t.clone(memory_format=torch.contiguous_format)


def followed(t: torch.Tensor) -> torch.Tensor:
    """`t` with the history that writes to other views of its memory gave it.

    Autograd makes it on access, and treats a view without it as a leaf when it is
    written to. A tensor of `torch.func` transforms has one for each level.
    """
    inner = t
    while True:
        if inner.requires_grad and is_view(inner):
            _ = inner.grad_fn
        if not functorch.is_functorch_wrapped_tensor(inner):
            return t
        inner = functorch.get_unwrapped(inner)


def own_tangent(t: torch.Tensor) -> torch.Tensor:
    """`t` with a tangent in memory of its own, where forward mode is active.

    The tangent of `t % 3` is that of `t` itself: two outputs, or an output and an argument, would
    share it.
    """
    return copy(t) if forward_level(forward_ad) >= 0 else t


def restride(t: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """A batch whose rows have the sample's strides, copied only where they differ."""
    if _rows_have(t, stride):
        return t
    repeated = [
        d + 1 for d, (n, s) in enumerate(zip(t.shape[1:], stride, strict=True)) if n > 1 > s
    ]
    if repeated:  # the sample's result is expanded there, so that all its entries are equal
        shape = t.shape
        for d in repeated:
            t = t.narrow(d, 0, 1)
        return restride(t, stride).expand(shape)
    order = sorted(range(len(stride)), key=lambda d: -stride[d])
    moved = t.permute(0, *[d + 1 for d in order]).clone(memory_format=torch.contiguous_format)
    out = moved.permute(0, *[order.index(d) + 1 for d in range(len(stride))])
    if _rows_have(out, stride):
        return out
    rows = (span(t.shape[1:], stride), *stride)  # with gaps
    return t.new_empty_strided(t.shape, rows).copy_(t)


def _rows_have(t: torch.Tensor, stride: Sequence[int]) -> bool:
    return all(
        n <= 1 or a == s for n, a, s in zip(t.shape[1:], t.stride()[1:], stride, strict=True)
    )


def check_answer(op: Any, expected: Any, mapped: list[bool], call: str, args: list[Any]) -> None:
    """Check that every sample gives the answer recorded for a question about a value."""
    tensors = flat_tensors(args)
    if any(map(is_empty_outside, tensors)):
        return  # none is asked
    if op in SCALARS and any(mapped):
        found = tensors[0].detach().reshape(-1)
        same = found == expected if expected == expected else found != found
        if type(expected) is float and expected == 0:  # python tells -0.0 from 0.0
            same &= found.signbit() == (math.copysign(1, expected) < 0)
        # One question for all samples: in a map inside a map it is one for the outer map, too.
        if not bool(same.all()):
            raise _varies(op, expected, None, call)
        return
    if op in CHECKS:
        failed = tensors[0].detach() != 0
        if mapped[0] and failed.numel():
            failed = failed.reshape(failed.shape[0], -1).any(1)
        if failed.numel() and not bool((failed == expected).all()):
            raise _varies(op, expected, None, call)
        return
    rows = max((t.shape[0] for t, m in zip(tensors, mapped, strict=True) if m), default=1)
    for i in range(rows):
        sample = iter([t[i] if m else t for t, m in zip(tensors, mapped, strict=True)])
        answer = op(*[next(sample) if isinstance(a, torch.Tensor) else a for a in args])
        if answer != expected and not (answer != answer and expected != expected):
            if any(mapped):
                raise _varies(op, expected, answer, call)
            raise errors.StaleRecordingError(
                f"{call}: python asked for the value of a tensor ({schema_of(op).name}), and it "
                "was "
                f"{expected} when the function was "
                "recorded but is "
                f"{answer} now; use trace='each', or torch.where"
            )


def _varies(op: Any, expected: Any, answer: Any, call: str) -> errors.VariesError:
    other = "another" if answer is None else answer
    return errors.VariesError(
        f"{call}: python asked for the value of a tensor that differs by sample "
        f"({schema_of(op).name}), and it is {expected} for the first sample but {other} for a "
        "later one; use torch.where, masks or comparisons that return tensors, or, in a backward "
        "or a hook, take the gradient inside the function"
    )


def check_shapes(
    expected: list[list[int]], call: str, mapped: list[bool], tensors: list[torch.Tensor]
) -> None:
    """Compare a result's shape, which depends on values, with the recorded one."""
    shapes = [list(t.shape[int(m) :]) for t, m in zip(tensors, mapped, strict=True)]
    if shapes != expected:
        raise other_shape(call, f"{expected} then, {shapes} now")


def other_shape(call: str, both: str) -> errors.StaleRecordingError:
    """The error for a result of another shape than the recorded one, since values have changed.

    Args:
        call: The user's call.
        both: The two shapes, in words.
    """
    return errors.StaleRecordingError(
        f"{call}: the shape of a result depends on the values of captured tensors, and they "
        f"have changed since the recording ({both}); use trace='each'"
    )
