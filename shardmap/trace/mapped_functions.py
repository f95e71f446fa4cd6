"""Record Functions that leave torch and map themselves as one operator each.

The forward of such a `torch.autograd.Function` is numpy's, say, and its `vmap` staticmethod tells
how it is batched. That its forward leaves torch shows when it is recorded: it is refused. The
function is then recorded again, with the forward replaced by a call of `own_function`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator

import torch
from torch.autograd.function import Function

from shardmap._threads import fork_safe_lock
from shardmap.program.own_function import OWN_FUNCTION, running, text_of

_known: weakref.WeakSet[type[Function]] = weakref.WeakSet()
"""Functions whose forward was seen to leave torch."""


class _Here(threading.local):
    depth = 0
    """Number of recordings of this thread that are active."""
    served: frozenset[int] = frozenset()
    """Identities of the Functions that the last recording had replaced."""


_here = _Here()
_lock = fork_safe_lock()
_users = 0
_replaced: list[tuple[type[Function], staticmethod | None]] = []
"""While there are recordings: Functions whose forward is replaced, with their own one, or None if
they inherit it."""


def met(error: BaseException) -> bool:
    """True if an error comes from the forward of a Function that maps itself.

    That is a reason to record again, unless the Function was recorded as an operator already.
    """
    codes: set[types.CodeType] = set()
    trace = error.__traceback__
    while trace is not None:
        codes.add(trace.tb_frame.f_code)
        trace = trace.tb_next
    found = {f for f in _subclasses(Function) if _maps_itself(f) and _code_of(f) in codes}
    with _lock:
        _known.update(found)
    return any(id(function) not in _here.served for function in found)


def _maps_itself(function: type[Function]) -> bool:
    return function.vmap is not Function.vmap and not function.generate_vmap_rule


def _code_of(function: type[Function]) -> types.CodeType | None:
    return getattr(inspect.unwrap(function.forward), "__code__", None)


def _subclasses(function: type[Function]) -> Iterator[type[Function]]:
    for sub in function.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _operator(function: type[Function], plain: Callable[..., object]) -> staticmethod:
    """The forward that is one recorded call, where this thread records."""

    @functools.wraps(plain)
    def forward(*args: object) -> object:
        text = None if running.inside or not _here.depth else text_of(function, args)
        if text is None:
            return plain(*args)
        found = OWN_FUNCTION([a for a in args if isinstance(a, torch.Tensor)], text)
        return found[0] if running.single else tuple(found)

    return staticmethod(forward)


_FORWARD = "forward"
"""The static method of a Function that an operator replaces; each class's own has another type."""


def _put_in() -> None:
    """Replace the forwards of all known Functions, and of those that inherit them."""
    heirs = [sub for function in _known for sub in _subclasses(function)]
    _known.update([f for f in heirs if _maps_itself(f) and "forward" not in vars(f)])
    done = {function for function, _ in _replaced}
    plain = {function: function.forward for function in _known if function not in done}
    for function, forward in plain.items():
        _replaced.append((function, vars(function).get(_FORWARD)))
        setattr(function, _FORWARD, _operator(function, forward))


def _restore() -> None:
    while _replaced:
        function, own = _replaced.pop()
        if own is None:
            del function.forward
        else:
            setattr(function, _FORWARD, own)


@contextlib.contextmanager
def recorded_as_operators() -> Iterator[None]:
    """Record the Functions that were met as operators; others, and other threads, are as ever."""
    global _users
    if not _known:
        _here.served = frozenset()
        yield
        return
    with _lock:
        _put_in()
        _users += 1
        _here.served = frozenset([id(function) for function in _known])
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            _users -= 1
            if not _users:
                _restore()
