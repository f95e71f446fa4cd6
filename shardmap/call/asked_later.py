"""Questions that a backward will ask of tensors that all samples share, asked before a replay.

A `torch.autograd.Function` or a hook may read `scale.item()` in its backward, which runs after the
call has returned. If the caller has written to `scale` since the recording, the function is
recorded again, as for a question that it asks itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch

from shardmap.call.memo import Prepared
from shardmap.program.analysis import random_call, written
from shardmap.program.autocast import plain_numerics
from shardmap.program.ir import Equation, Param, Program, SampleDevice, Var
from shardmap.program.own_backward import NO_EFFECT, OWN_BACKWARD, TOO_DEEP, backward_of
from shardmap.trace.batch import Batch
from shardmap.trace.recording import Recording, is_plain


class Memory(Protocol):
    """Recordings of earlier calls."""

    def forget(self, batch: Batch) -> None:
        """Drop the recording that served a call."""
        ...


def outdated(prepared: Prepared, memory: Memory, batch: Batch) -> bool:
    """True if such a question has another answer now; the recording is dropped then.

    Args:
        prepared: The recording that would serve this call.
        memory: What it comes from.
        batch: The call's arguments.
    """
    if not prepared.recording.asks_later or not _has_changed(prepared.recording):
        return False
    memory.forget(batch)
    return True


def _has_changed(recording: Recording) -> bool:
    """True if a question has another answer, as far as captured tensors decide it."""
    program = recording.program
    pairs = (
        *zip(program.captured, recording.captured, strict=True),
        *zip(program.literals, recording.literals, strict=True),
    )
    known = {var.index: t for var, t in pairs if type(t) is not torch.Tensor or is_plain(t)}
    with torch.no_grad(), plain_numerics():
        return _differs(program, known, recording.scalars)


def _differs(program: Program, known: dict[int, torch.Tensor], numbers: Sequence[float]) -> bool:
    """True if a question in a program, or in a backward in it, has another answer.

    Args:
        program: The program.
        known: The tensors that it shares among all samples, by index of their variables.
        numbers: The numbers that it takes from python.
    """
    wanted = _wanted(program)
    changed = {v.group for eq in program.equations for v in written(eq)}
    device = next(iter(known.values())).device if known else torch.device("cpu")

    def value(argument: object) -> object:
        if type(argument) is Var:
            return known[argument.index]
        if type(argument) is Param:
            return numbers[argument.scalar]
        if type(argument) is SampleDevice:
            return device
        if type(argument) is tuple or type(argument) is list:
            return [value(a) for a in argument]
        return argument

    for eq in program.equations:
        if eq.op is OWN_BACKWARD:
            if _later_differs(eq, known, value):
                return True
            continue
        answer = eq.answer if eq.answer is not None and eq.answer[0] == "value" else None
        if answer is None and not any(v.index in wanted for v in eq.results()):
            continue
        read = list(eq.inputs())
        if random_call(eq) or any(v.index not in known or v.group in changed for v in read):
            continue
        out = eq.op(*map(value, eq.args), **{k: value(v) for k, v in eq.kwargs})
        if answer is not None:
            if not _alike(out, answer[1]):
                return True
            continue
        results = out if isinstance(out, tuple | list) else [out]
        for var, t in zip(eq.outs, results, strict=False):
            if type(var) is Var and isinstance(t, torch.Tensor):
                known[var.index] = t
    return False


def _later_differs(
    eq: Equation, known: Mapping[int, torch.Tensor], value: Callable[[object], object]
) -> bool:
    """True if the backward that `eq` gives to results has a question with another answer."""
    if eq.args[4] in (NO_EFFECT, TOO_DEEP):
        return False
    backward = backward_of(eq.args[4])
    program, first = backward.program, backward.cotangents + len(backward.saved)
    names = (*program.inputs[first:], *program.captured, *program.literals)
    kept = {
        var.index: known[outer.index]
        for var, outer in zip(names, eq.args[2], strict=False)
        if outer.index in known
    }
    return _differs(program, kept, cast(list[float], value(eq.args[3])))


def _wanted(program: Program) -> set[int]:
    """The values that lead to questions, or to what a backward keeps for its own."""
    found: set[int] = set()
    for eq in reversed(program.equations):
        if eq.op is OWN_BACKWARD:
            found.update(v.index for v in eq.args[2])
        elif eq.answer is not None or any(v.index in found for v in eq.results()):
            found.update(v.index for v in eq.inputs())
    return found


def _alike(answer: object, recorded: object) -> bool:
    """True for equal answers; NaN is equal to itself."""
    return answer == recorded or (answer != answer and recorded != recorded)
