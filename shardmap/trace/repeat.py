"""Match a recording against the last recording of the same code.

A call that repeats it is recognised instead of encoded anew.

A function that is recorded at each call mostly repeats its last recording. Comparing a call
with the expected one costs a third of encoding it. Where they differ, recording goes on as if
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
"""Result of `repeat` for a call that is not the expected one and has not been run."""

_CAPACITY = 256
_PATHS = 256
"""Most programs of one code that are kept: it may take different paths, for many shapes."""
_last: collections.OrderedDict[Hashable, dict[int, tuple[Program, dict[str, str]]]] = (
    collections.OrderedDict()
)
"""For each code, its programs with their sources by address, the last one last."""
_lock = fork_safe_lock()


class Expecting(Protocol):
    """Protocol of a recording that expects a program, as `repeat` uses it."""

    types: list[Any]
    scalars: list[float]
    mapped_groups: set[int]
    entries: dict[int, tuple[weakref.ref, Var]]
    captured: dict[int, tuple[Var, torch.Tensor]]
    unwritten: Unwritten
    expected: Program | None

    def captured_var(self, tensor: torch.Tensor) -> Var:
        """The variable of a tensor that was not recorded; the tensor is captured from now on."""
        ...

    def encode(self, value: Any, flags: list[int], param: bool) -> Any:
        """Encode an argument for the program."""
        ...

    def kernel(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operator below the recording."""
        ...

    def adopt(self, out: Any, eq: Equation, mapped: bool) -> None:
        """Add the expected equation `eq` for the call that has just returned `out`."""
        ...


def code_of(func: Callable[..., Any]) -> Hashable:
    """A key for the code of `func`, whatever it closes over; None if there is none."""
    inner = getattr(func, "__func__", func)
    code = getattr(inner, "__code__", None)
    if code is not None and hasattr(inner, "__wrapped__"):  # wrappers share their code
        return code, code_of(inner.__wrapped__)
    return type(func) if code is None and not isinstance(func, type) else code


def expected(func: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> tuple[Program, ...]:
    """The kept programs of this code, the last one first.

    Args:
        func: The user's function.
        shapes: Shapes of the sample to be recorded: samples of other shapes make other calls.
    """
    key = code_of(func)
    with _lock:
        last = list(_last.get(key, {}).values())  # in one step: others may remember theirs
    known = [program for program, _ in reversed(last)]
    return tuple([p for p in known if [v.spec.shape for v in p.inputs] == shapes])


def turn(programs: Sequence[Program], before: list[Equation], question: Equation) -> Program | None:
    """The program in which the same calls are followed by this question with its answer."""
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
    """Keep `program` as the one expected of this code next time.

    Returns its `sources`, with those of calls that were only repeated.
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
    """Drop the programs of this code, so that its next recording is checked like a first one."""
    with _lock:
        _last.pop(code_of(func), None)


def clear() -> None:
    """Drop all programs."""
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

    This runs for each operator of each recording, and so is written for speed.
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
                # equal in python, but not identical: the expected recording must not be used
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
    """True if two encoded arguments are identical to an operator.

    In python `1 == 1.0 == True` and `0.0 == -0.0`.
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
