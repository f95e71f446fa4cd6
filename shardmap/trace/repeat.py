"""Record against the last recording of the same code.

A call that repeats it is recognised instead of described anew.

A function that is recorded at each call mostly does what it did the last time. Comparing a call
with the expected one costs a third of describing it. Where they differ, recording goes on as if
nothing had been expected.
"""

from __future__ import annotations

import collections
import operator
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch

from shardmap._threads import fork_safe_lock
from shardmap.program.ir import FRESH_LEAF, Equation, Param, Program, Var, variables
from shardmap.trace.unwritten import Unwritten

DIFFERENT = object()
"""What `repeat` returns where the call is not the expected one; nothing has been run then."""

_CAPACITY = 256
_PATHS = 64
"""How many programs of one code are expected: it may go different ways."""
_last: collections.OrderedDict[Hashable, dict[int, tuple[Program, dict[str, str]]]] = (
    collections.OrderedDict()
)
"""For each code, its programs with their sources by address, the last one last."""
_lock = fork_safe_lock()


class Expecting(Protocol):
    """What `repeat` reads and writes of a recording that expects a program."""

    types: list[Any]
    scalars: list[float]
    mapped_groups: set[int]
    entries: dict[int, tuple[weakref.ref, Var]]
    captured: dict[int, tuple[Var, torch.Tensor]]
    unwritten: Unwritten
    expected: Program | None

    def captured_var(self, tensor: torch.Tensor) -> Var:
        """The variable of a tensor that was not recorded: from now on it is captured."""
        ...

    def encode(self, value: Any, flags: list[int], param: bool) -> Any:
        """An argument as the program holds it."""
        ...

    def kernel(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operator below the recording."""
        ...

    def adopt(self, out: Any, eq: Equation, mapped: bool) -> None:
        """Take `eq` as what has just been recorded with the result `out`."""
        ...


def code_of(func: Callable[..., Any]) -> Hashable:
    """What identifies the code of `func`, whatever it closes over; None if nothing does."""
    inner = getattr(func, "__func__", func)
    code = getattr(inner, "__code__", None)
    if code is not None and hasattr(inner, "__wrapped__"):  # wrappers share their code
        return code, code_of(inner.__wrapped__)
    return type(func) if code is None and not isinstance(func, type) else code


def expected(func: Callable[..., Any]) -> tuple[Program, ...]:
    """The recordings of this code that are remembered, the last one first."""
    key = code_of(func)
    with _lock:
        return tuple([program for program, _ in reversed(_last.get(key, {}).values())])


def turn(programs: Sequence[Program], before: list[Equation], question: Equation) -> Program | None:
    """The program in which the same calls are followed by this question and its answer."""
    number = len(before)
    for program in programs:
        equations = program.equations
        if (
            len(equations) > number
            and equations[number] == question
            and alike(equations[number].answer, question.answer)
        ):
            if all(map(operator.is_, equations[:number], before)) or (
                equations[:number] == tuple(before)
            ):
                return program
    return None


def remember(func: Callable[..., Any], program: Program, sources: dict[str, str]) -> dict[str, str]:
    """Expect `program` of this code the next time.

    Returns its `sources`, those of calls that were only repeated included.
    """
    key = code_of(func)
    if key is None:
        return sources
    with _lock:
        known = _last.setdefault(key, {})
        if id(program) in known:
            sources = known.pop(id(program))[1] | sources
        known[id(program)] = program, sources
        if len(known) > _PATHS:
            known.pop(next(iter(known)))
        _last.move_to_end(key)
        while len(_last) > _CAPACITY:
            _last.popitem(last=False)
    return sources


def forget(func: Callable[..., Any]) -> None:
    """Expect nothing of this code: the next recording of it is looked at as the first."""
    with _lock:
        _last.pop(code_of(func), None)


def clear() -> None:
    """Forget what was recorded: nothing is expected."""
    with _lock:
        _last.clear()


def repeat(
    recorder: Expecting,
    eq: Equation,
    func: Any,
    args: tuple,
    kwargs: dict[str, Any],
    is_own_leaf: Callable[[torch.Tensor], bool],
) -> Any:
    """Run a plain call if it is `eq` again, and return its result; `DIFFERENT` if it is not.

    This runs for each operator of each recording: it is written for speed.
    """
    wanted_args = eq.args
    if (
        eq.op is not func
        or len(args) != len(wanted_args)
        or len(kwargs) != len(eq.kwargs)
        or eq.grad_mode is not torch.is_grad_enabled()
    ):
        return DIFFERENT
    marks = len(recorder.types), len(recorder.scalars)
    groups, entries, eq_flags, mapped, number = (
        recorder.mapped_groups,
        recorder.entries,
        eq.flags,
        False,
        0,
    )
    unwritten = recorder.unwritten.groups
    if kwargs:
        for name, wanted in zip(kwargs, eq.kwargs, strict=True):
            if name != wanted[0]:
                return DIFFERENT
        args_and_wanted = zip(
            (*args, *kwargs.values()), (*wanted_args, *[w for _, w in eq.kwargs]), strict=True
        )
    else:
        args_and_wanted = zip(args, wanted_args, strict=True)
    for value, wanted in args_and_wanted:
        kind = type(wanted)
        if kind is Var:
            if not isinstance(value, torch.Tensor):
                return _undo(recorder, marks)
            entry = entries.get(id(value))
            var = (
                entry[1]
                if entry is not None and entry[0]() is value
                else recorder.captured_var(value)
            )
            if var is not wanted and var != wanted:
                return _undo(recorder, marks)
            flag = eq_flags[number]
            number += 1
            if value.requires_grad:
                if flag == 0 or (flag == FRESH_LEAF) != (
                    var.index not in recorder.captured and is_own_leaf(value)
                ):
                    return _undo(recorder, marks)
            elif flag:
                return _undo(recorder, marks)
            if var.group in groups:
                mapped = True
            if unwritten and var.group in unwritten:
                return _undo(recorder, marks)
        elif kind is int or wanted is None:
            if type(value) is not kind or value != wanted:  # a tensor has no truth
                return _undo(recorder, marks)
        else:
            flags: list[int] = []
            encoded = recorder.encode(value, flags, kind is Param)
            if not alike(encoded, wanted):
                # equal to python all the same: nothing of the expected recording may stand for it
                recorder.expected = None
                return _undo(recorder, marks)
            if tuple(flags) != eq_flags[number : number + len(flags)]:
                return _undo(recorder, marks)
            number += len(flags)
            mapped = mapped or any(v.group in groups for v in variables((encoded,)))
            if unwritten and any(v.group in unwritten for v in variables((encoded,))):
                return _undo(recorder, marks)
    out = recorder.kernel(func, args, kwargs)
    recorder.adopt(out, eq, mapped)
    return out


def alike(a: Any, b: Any) -> bool:
    """Whether two encoded arguments are the same to an operator.

    To python `1 == 1.0 == True` and `0.0 == -0.0`.
    """
    kind = type(a)
    if kind is not type(b):
        return False
    if kind is tuple:
        return len(a) == len(b) and all(map(alike, a, b))
    if kind is float:
        return a.hex() == b.hex()
    if kind is complex:
        return alike((a.real, a.imag), (b.real, b.imag))
    return a == b


def _undo(recorder: Expecting, marks: tuple[int, int]) -> object:
    del recorder.types[marks[0] :]
    del recorder.scalars[marks[1] :]
    return DIFFERENT
