"""Restore the state that torch keeps per thread after a call, however the call ends.

Context managers restore what they change, but not if an exception strikes between a change and the
bookkeeping for it: Ctrl-C, or a time limit that raises from a signal handler, may do so at any
bytecode, also inside torch's own managers. So the outermost frame saves the whole state and
restores it.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import itertools
import operator
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from shardmap._threads import (
    alone,
    forget_interrupted_generators,
    fork_safe_lock,
    restore_interrupted_generators,
)
from shardmap._torch import (
    allow_saved_hooks,
    are_scripts_optimized,
    dispatch_depth,
    dispatch_modes,
    eager_transforms,
    forward_level,
    function_depth,
    function_modes,
    functorch,
    inference_guard,
    is_dispatch_mode_on,
    is_forward_on,
    is_multithreading_on,
    leave_forward_level,
    note_that_no_dispatch_mode_is_on,
    optimize_scripts,
    pop_dispatch_mode,
    pop_function_mode,
    pop_saved_hooks,
    push_dispatch_mode,
    push_function_mode,
    push_saved_hooks,
    refuse_saved_hooks,
    saved_hooks,
    set_forward,
    set_forward_level,
    set_grad,
    set_multithreading,
    set_tracing_context,
    tracing_context,
    why_saved_hooks_are_refused,
)
from shardmap.trace.generator import stop_watching

_active: dict[int, weakref.ref[_Kept]] = {}
"""The outermost call of each thread, while it is alive."""
_flags = fork_safe_lock()
"""Held while `_active`, or torch's flags that a dispatch mode is on, are read or changed."""
_variables: list[contextvars.ContextVar[Any]] = []
_guards: list[Any] = []
"""Inference mode guards that must not be left: see `_restore_inference`."""


def keep(variable: contextvars.ContextVar[Any]) -> None:
    """Restore a context variable of ours, which has a default, along with torch's state."""
    _variables.append(variable)


def thread_state_kept() -> _Kept:
    """Restore the state of this thread if the body raises.

    Written `with thread_state_kept() as kept, kept.twice:`, because an interrupt may strike where
    the inner one begins to restore; then the outer one does it.
    """
    return _Kept()


class _Kept:
    """Restores the state of this thread if the body raises.

    Reading the state takes some microseconds, which is its only cost if no error is raised.
    """

    def __init__(self) -> None:
        self.twice = _Twice(self)
        self.done = False
        self.left_jvp = False

    def __enter__(self) -> _Kept:
        self.grad: bool = torch.is_grad_enabled()
        self.inference: bool = torch.is_inference_mode_enabled()
        self.forward: bool = is_forward_on()
        self.multithreading: bool = is_multithreading_on()
        self.in_place: bool = functorch.get_inplace_requires_grad_allowed()
        self.own_functions: bool = functorch.get_single_level_autograd_function_allowed()
        self.functions = function_modes() if function_depth() else []
        self.dispatch = dispatch_modes() if dispatch_depth() else []
        self.layers = _layers()
        self.autocast = [_autocast("cpu"), _autocast("cuda")]
        self.cache: bool = torch.is_autocast_cache_enabled()
        self.nesting = _nesting()
        self.hooks = saved_hooks(True)
        self.hooks_refused = why_saved_hooks_are_refused()
        self.jvps: int = eager_transforms.JVP_NESTING
        self.level: int = forward_level(forward_ad)
        self.tracing = tracing_context()
        self.scripts: bool = are_scripts_optimized()
        self.variables = [v.get() for v in _variables]
        self.handled = sys.exc_info()[1]
        self.thread = threading.get_ident()
        with _flags:
            around = _active.get(self.thread)
            self.outermost = around is None or around() is None
            if self.outermost:
                _active[self.thread] = weakref.ref(self)
        if self.outermost and alone():
            forget_interrupted_generators()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.done:
            return
        interrupted = None
        while True:  # a second interrupt must not leave half of it: every step can be repeated
            try:
                if error is not None:
                    self._restore(error)
                if self.outermost:
                    self._leave()
                self.done = True
                break
            except KeyboardInterrupt as again:
                interrupted = again
        if interrupted is None and isinstance(error, Exception):
            interrupted = _interrupt_behind(error)
            if interrupted is self.handled:
                return
        if interrupted is not None:
            raise interrupted

    def _leave(self) -> None:
        """Clear the notes that a dispatch mode is on, if the last one of ours has ended.

        Torch notes that per process, not per thread: when two threads leave their modes in turn,
        the note may stay, and `torch.compile` would not compile any more.
        """
        with _flags:
            _active.pop(self.thread, None)
            if self.dispatch or not is_dispatch_mode_on():
                return
            if not any(call() is not None for call in _active.values()):
                note_that_no_dispatch_mode_is_on()

    def _changed(self) -> bool:
        """True if any state that a generator may still restore later has changed."""
        return (
            self.grad is not torch.is_grad_enabled()
            or self.inference is not torch.is_inference_mode_enabled()
            or len(self.functions) != function_depth()
            or len(self.dispatch) != dispatch_depth()
            or len(self.layers) != functorch.get_dynamic_layer_stack_depth()
            or self.nesting != _nesting()
            or self.hooks != saved_hooks(True)
            or self.jvps != eager_transforms.JVP_NESTING
        )

    def _restore(self, error: BaseException) -> None:
        if not isinstance(error, Exception) or self._changed():
            # A context manager that was interrupted while it was being entered is held by the
            # frames of the traceback, and undoes its changes when they die: it must do so now, not
            # later.
            _let_go(error)
        self._restore_inference()
        self._restore_transforms()
        self._restore_modes()
        self._restore_autocast()
        self._restore_hooks()
        functorch.set_inplace_requires_grad_allowed(self.in_place)
        functorch.set_single_level_autograd_function_allowed(self.own_functions)
        set_multithreading(self.multithreading)
        set_forward(self.forward)
        set_grad(self.grad)
        set_tracing_context(self.tracing)
        optimize_scripts(self.scripts)
        if self.outermost:
            stop_watching()
            restore_interrupted_generators()
        for variable, value in zip(_variables, self.variables, strict=True):
            if variable.get() is not value:
                variable.set(value)

    def _restore_inference(self) -> None:
        if torch.is_inference_mode_enabled() is self.inference:
            return
        # Torch can set it only by a guard, which is kept: leaving the guard would undo it.
        guard = inference_guard(self.inference)
        _guards.append(guard)
        guard.__enter__()

    def _restore_transforms(self) -> None:
        """Restore the levels of `torch.func`, and the counts that it keeps beside them."""
        jvp = functorch.TransformType.Jvp
        left = (functorch.get_interpreter_stack() or [])[len(self.layers) :]
        self.left_jvp = self.left_jvp or any(level.key() == jvp for level in left)
        if self.layers or left:
            _pop_layers()
            _push_layers(self.layers)
        if eager_transforms.JVP_NESTING > self.jvps and (self.left_jvp or alone()):
            eager_transforms.JVP_NESTING = self.jvps
        if self.level < 0 and (forward_level(forward_ad) > self.level or self.left_jvp or alone()):
            with contextlib.suppress(RuntimeError):  # there may be none to leave: torch cannot say
                leave_forward_level(level=0)
            set_forward_level(self.level)

    def _restore_modes(self) -> None:
        if not _same(function_modes(), self.functions):
            while function_depth():
                pop_function_mode()
            for mode in self.functions:
                push_function_mode(mode)
        if not _same(dispatch_modes(), self.dispatch):
            while dispatch_depth():
                pop_dispatch_mode()
            for mode in self.dispatch:
                push_dispatch_mode(mode)

    def _restore_autocast(self) -> None:
        for device, (on, dtype) in zip(("cpu", "cuda"), self.autocast, strict=True):
            torch.set_autocast_enabled(device, on)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.cache)
        if _nesting() != self.nesting:
            while _nesting() > self.nesting:
                torch.autocast_decrement_nesting()
            while _nesting() < self.nesting:
                torch.autocast_increment_nesting()
            torch.clear_autocast_cache()  # weights as they were cast inside

    def _restore_hooks(self) -> None:
        if saved_hooks(True) != self.hooks:
            allow_saved_hooks()
            while saved_hooks(True) is not None and saved_hooks(True) != self.hooks:
                pop_saved_hooks()
            if saved_hooks(True) is None and self.hooks is not None:
                push_saved_hooks(*self.hooks)
        if why_saved_hooks_are_refused() != self.hooks_refused:
            if self.hooks_refused is None:
                allow_saved_hooks()
            else:
                refuse_saved_hooks(self.hooks_refused, self.hooks is None)


class _Twice:
    """Context that repeats the exit of the manager around it, before that."""

    __slots__ = ("_kept",)

    def __init__(self, kept: _Kept):
        self._kept = weakref.ref(kept)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        kept = self._kept()
        assert kept is not None
        kept.__exit__(kind, error, trace)


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _layers() -> list[Any]:
    """The levels of `torch.func`, outermost first."""
    found: list[Any] = []
    if functorch.get_dynamic_layer_stack_depth():
        try:
            _pop_layers(found)
        finally:
            _push_layers(found[::-1])
    return found[::-1]


def _pop_layers(into: list[Any] | None = None) -> None:
    """Remove all levels, innermost first.

    No python code runs between two of them, where an interrupt could strike; nor in
    `_push_layers`.
    """
    depth = functorch.get_dynamic_layer_stack_depth()
    popped = itertools.starmap(functorch.pop_dynamic_layer_stack, itertools.repeat((), depth))
    ([] if into is None else into).extend(popped)


def _push_layers(layers: Sequence[Any]) -> None:
    collections.deque(map(functorch.push_dynamic_layer_stack, layers), maxlen=0)


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _nesting() -> int:
    """Number of autocast contexts that this thread is in."""
    try:
        nesting = torch.autocast_increment_nesting() - 1
    finally:
        torch.autocast_decrement_nesting()
    return nesting


def _interrupt_behind(error: BaseException | None) -> BaseException | None:
    """The interrupt behind an error that one of torch's context managers raised in its exit.

    When it is interrupted while it is being entered or left, torch raises "trying to pop from empty
    mode stack", for example, in the manager around it.
    """
    while isinstance(error, Exception) and error.__traceback__ is not None:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith(_UNWINDING):
            return None  # an error of other code, about the interrupt or not
        error = error.__context__
    return None if error is None or isinstance(error, Exception) else error


_UNWINDING = (
    os.path.join(os.path.dirname(str(torch.__file__)), ""),
    os.path.join(os.path.dirname(__file__), "surroundings.py"),
    str(contextlib.__file__),
)
"""Files with the code that may raise in its exit."""


def _let_go(error: BaseException | None) -> None:
    """Clear the frames of an exception's traceback, and of those that it was raised from."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        at = waiting.pop()
        if at is not None and id(at) not in seen:
            seen.add(id(at))
            traceback.clear_frames(at.__traceback__)
            waiting += [at.__context__, at.__cause__]
