"""Record against the last recording of the same code: a call that repeats it is recognised instead of described anew.

A function that is recorded at each call mostly does what it did the last time. Comparing a call with the expected one costs a
third of describing it. Where they differ, recording goes on as if nothing had been expected.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from shardmap.program import FRESH_LEAF, Equation, Param, Program, Var

if TYPE_CHECKING:
    from shardmap.trace import Recorder

DIFFERENT = object()
"""What `repeat` returns where the call is not the expected one; nothing has been run then."""

_CAPACITY = 256
_last: collections.OrderedDict[Any, Program] = collections.OrderedDict()
_lock = threading.Lock()


def code_of(func: Callable[..., Any]) -> Any:
    """What identifies the code of `func`, whatever it closes over; None if nothing does."""
    inner = getattr(func, "__func__", func)
    code = getattr(inner, "__code__", None)
    return type(func) if code is None and not isinstance(func, type) else code


def expected(func: Callable[..., Any]) -> Program | None:
    """The last recording of this code."""
    with _lock:
        return _last.get(code_of(func))


def remember(func: Callable[..., Any], program: Program) -> None:
    """Expect `program` of this code the next time."""
    key = code_of(func)
    if key is None:
        return
    with _lock:
        _last[key] = program
        _last.move_to_end(key)
        while len(_last) > _CAPACITY:
            _last.popitem(last=False)


def repeat(recorder: Recorder, eq: Equation, func: Any, args: tuple, kwargs: dict[str, Any], is_own_leaf: Callable[[Any], bool]) -> Any:
    """Run a plain call if it is `eq` again, and return its result; `DIFFERENT` if it is not."""
    if eq.op is not func or len(args) != len(eq.args) or len(kwargs) != len(eq.kwargs) or eq.grad_mode is not torch.is_grad_enabled():
        return DIFFERENT
    marks = len(recorder.types), len(recorder.scalars)
    groups, entries, mapped, number = recorder.mapped_groups, recorder.entries, False, 0
    pairs = zip(args, eq.args, strict=True)
    if kwargs:
        named = zip(kwargs.items(), eq.kwargs, strict=True)
        pairs = [*pairs, *[(value, wanted[1] if name == wanted[0] else DIFFERENT) for (name, value), wanted in named]]
    for value, wanted in pairs:
        if isinstance(value, torch.Tensor):
            entry = entries.get(id(value))
            var = entry[1] if entry is not None and entry[0]() is value else recorder.captured_var(value)
            if (var is not wanted and var != wanted) or not _same_flag(recorder, value, var, eq.flags[number], is_own_leaf):
                return _undo(recorder, marks)
            number += 1
            mapped = mapped or var.group in groups
        elif type(value) is int or value is None:
            if value != wanted or type(wanted) is not type(value):
                return _undo(recorder, marks)
        else:
            flags: list[int] = []
            encoded = recorder.encode(value, flags, type(wanted) is Param)
            if encoded != wanted or tuple(flags) != eq.flags[number : number + len(flags)]:
                return _undo(recorder, marks)
            number += len(flags)
            mapped = mapped or any(v.group in groups for v in _vars(encoded))
    out = func._op(*args, **kwargs)
    results = (out,) if isinstance(out, torch.Tensor) else out
    recorder.adopt(results, eq, mapped)
    return out


def _vars(value: Any) -> Any:
    if type(value) is Var:
        yield value
    elif type(value) is tuple:
        for item in value:
            yield from _vars(item)


def _same_flag(recorder: Recorder, value: torch.Tensor, var: Var, flag: int, is_own_leaf: Callable[[Any], bool]) -> bool:
    if not value.requires_grad:
        return flag == 0
    return flag != 0 and (flag == FRESH_LEAF) == (var.index not in recorder.captured and is_own_leaf(value))


def _undo(recorder: Recorder, marks: tuple[int, int]) -> Any:
    del recorder.types[marks[0] :]
    del recorder.scalars[marks[1] :]
    return DIFFERENT

