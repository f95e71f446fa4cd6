"""Record Functions that leave torch and map themselves as one operator each.

The forward of such a `torch.autograd.Function` is numpy's, say, and its `vmap` staticmethod tells
how it is batched. That its forward leaves torch shows when it is recorded: it is refused. The
function is then recorded again, with the forward replaced by a call of `own_function`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator

import torch
from torch.autograd.function import Function

from shardmap._threads import fork_safe_lock
from shardmap.program.own_function import OWN_FUNCTION, single, text_of

_opaque: weakref.WeakKeyDictionary[type[Function], type[Function]] = weakref.WeakKeyDictionary()
"""For each Function whose forward was seen to leave torch: the one that is recorded instead."""


class _Here(threading.local):
    depth = 0
    """Number of recordings of this thread that are active."""


_here = _Here()
_lock = fork_safe_lock()
_users = 0
_own: classmethod = vars(Function)["apply"]
_apply: Callable[..., object] = _own.__func__


def met(error: BaseException) -> bool:
    """True if an error comes from the forward of a Function that maps itself, and is a new one."""
    codes: set[types.CodeType] = set()
    trace = error.__traceback__
    while trace is not None:
        codes.add(trace.tb_frame.f_code)
        trace = trace.tb_next
    found = False
    for function in _subclasses(Function):
        forward = getattr(function.forward, "__code__", None)
        maps = function.vmap is not Function.vmap and not function.generate_vmap_rule
        if forward in codes and maps and not _is_known(function):
            _opaque[function] = _replaced(function)
            found = True
    return found


def _is_known(function: type[Function]) -> bool:
    return function in _opaque or isinstance(vars(function).get("forward"), _Forward)


def _subclasses(function: type[Function]) -> Iterator[type[Function]]:
    for sub in function.__subclasses__():
        yield sub
        yield from _subclasses(sub)


class _Forward(staticmethod):
    """The forward of a Function that is recorded as one operator."""


def _replaced(function: type[Function]) -> type[Function]:
    """The Function with a forward that is one recorded call."""
    plain = function.forward

    @functools.wraps(plain)
    def forward(*args: object) -> object:
        text = text_of(function, args)
        if text is None:
            return plain(*args)
        found = OWN_FUNCTION([a for a in args if isinstance(a, torch.Tensor)], text)
        return found[0] if single.result else tuple(found)

    names = {name: getattr(function, name) for name in ("__module__", "__qualname__")}
    return type(function)(function.__name__, (function,), {"forward": _Forward(forward), **names})  # pyright: ignore[reportCallIssue]


def _applied(cls: type[Function], *args: object, **kwargs: object) -> object:
    """`Function.apply` while this thread or another records."""
    chosen = _opaque.get(cls, cls) if _here.depth else cls
    return _apply(chosen, *args, **kwargs)


@contextlib.contextmanager
def recorded_as_operators() -> Iterator[None]:
    """Record the Functions that were met as operators; others, and other threads, are as ever."""
    global _users
    if not _opaque:
        yield
        return
    with _lock:
        _users += 1
        Function.apply = classmethod(_applied)  # pyright: ignore[reportAttributeAccessIssue]
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            _users -= 1
            if not _users:
                Function.apply = _own  # pyright: ignore[reportAttributeAccessIssue]
