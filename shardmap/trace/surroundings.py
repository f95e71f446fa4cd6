"""The state around a recording, which is set aside while it runs and restored afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import random
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.random  # imported now: lazily, a signal handler may interrupt it
import torch

from shardmap._threads import alone, default_generator_states, restore_default_generators
from shardmap._torch import (
    device_mode,
    dispatch_key,
    dispatch_modes,
    enter_vmap_level,
    exclude_key,
    function_modes,
    function_state,
    function_states,
    functorch,
    interpreters_aside,
    is_key_excluded,
    leave_vmap_level,
    pop_dispatch_mode,
    pop_function_mode,
    push_dispatch_mode,
    push_function_mode,
    set_function_state,
)
from shardmap.trace.escapes import Doors
from shardmap.trace.recorder import Recorder
from shardmap.trace.recording import element
from shardmap.trace.thread_state import thread_state_kept


@contextlib.contextmanager
def transforms_set_aside() -> Iterator[int]:
    """Set the `torch.func` transforms around the call aside; yields how many there are.

    Inert levels take their places, so that the levels of transforms inside the function are
    numbered above those outside.
    """
    top = functorch.peek_interpreter_stack()
    if top is None:
        yield 0
        return
    depth = top.level()
    allowed = functorch.get_inplace_requires_grad_allowed()
    try:
        with interpreters_aside():
            for _ in range(depth):
                enter_vmap_level(1, "same")
            functorch.set_inplace_requires_grad_allowed(True)
            try:
                # The outermost call cannot see levels that an interrupt leaves in here.
                with thread_state_kept() as kept, kept.twice:
                    yield depth
            finally:
                for _ in range(depth):
                    leave_vmap_level()
    finally:
        functorch.set_inplace_requires_grad_allowed(allowed)


def forward_mode_alone(tensors: Sequence[torch.Tensor]) -> bool:
    """True if neither a transform around the call nor `tensors` require reverse-mode gradients."""
    levels = functorch.get_interpreter_stack() or []
    backwards = any(level.key() == functorch.TransformType.Grad for level in levels)
    return not backwards and not any(element(t).requires_grad for t in tensors)


@contextlib.contextmanager
def outer_recordings_suspended() -> Iterator[None]:
    """Set the modes of outer recordings aside, and leave every other mode where it is.

    An inner map's sample must not be recorded by the outer map: only the inner replay is.
    """
    dispatch = list(dispatch_modes())
    function = list(function_modes())
    if not any(isinstance(m, Recorder) for m in dispatch):
        yield
        return
    for _ in dispatch:
        pop_dispatch_mode()
    for _ in function:
        pop_function_mode()
    try:
        with contextlib.ExitStack() as stack:
            for mode in (*function, *dispatch):
                if not isinstance(mode, Recorder | Doors):
                    stack.enter_context(mode)
            yield
    finally:
        for mode in function:
            push_function_mode(mode)
        for mode in dispatch:
            push_dispatch_mode(mode)


@contextlib.contextmanager
def callers_functions_aside() -> Iterator[None]:
    """Set the function modes of the caller aside, but for those that say where tensors are made.

    What a gradient from outside will call is recorded without the modes around the map.
    """
    modes = list(function_modes())
    kept = [mode for mode in modes if isinstance(mode, device_mode)]
    if len(kept) == len(modes):
        yield
        return
    for _ in modes:
        pop_function_mode()
    try:
        with contextlib.ExitStack() as stack:
            for mode in kept:
                stack.enter_context(mode)
            yield
    finally:
        for mode in modes:
            push_function_mode(mode)


_PYTHON_KEYS = (dispatch_key.Python, dispatch_key.PythonTLSSnapshot)


@contextlib.contextmanager
def overrides_enabled() -> Iterator[None]:
    """Let modes see calls, even if the surrounding code has switched them off in this thread.

    A map called by a signal handler may run between two lines of torch, or of ours, that
    run without modes: nothing would be recorded, and the sample's results would become constants.
    """
    hidden = [k for k in _PYTHON_KEYS if is_key_excluded(k)]
    functions = function_state()
    off = functions == function_states.ALL_DISABLED
    if not hidden and not off:
        yield
        return
    try:
        for key in hidden:
            exclude_key(key, False)
        if off:  # modes are on then; subclasses of tensors stay as they are
            set_function_state(function_states.SUBCLASSES_DISABLED)
        yield
    finally:
        for key in hidden:
            exclude_key(key, True)
        set_function_state(functions)


class RandomStates:
    """The global random states around a recording, compared and restored.

    A recording itself draws from generators of its own (`PrivateGenerators`), so that
    these states change only if the function seeds or draws without a recorded operator. Beside
    other threads it is unknown who changed them: then nothing is restored, as that would rewind
    their draws.
    """

    def __init__(self, device: torch.device):
        self.torch = default_generator_states(device)
        self.python = _python_state()
        self.numpy = _numpy_state()

    def restore(self) -> str | None:
        """Restore the states; return the name of a python random source that was drawn from."""
        restore_default_generators(self.torch)
        drawn = None
        if _python_state() != self.python:
            drawn = "random"
            if alone():
                _restore_python(self.python)
        if _numpy_state() != self.numpy:
            drawn = "numpy.random"
            if alone():
                _restore_numpy(self.numpy)
        return drawn


_python: random.Random = vars(random)["_inst"]  # the generator of `random.random()`
_HEAD, _PYTHON_BYTES = object.__basicsize__, 4 * (1 + 624)
"""Where the state of python's generator lies in its object: the position of the next word, and 624
words."""


def _is_readable() -> bool:
    """True if python keeps the state of its generator where this module reads it."""
    own = random.Random(0)
    own.random()
    position, *words = struct.unpack("i624I", ctypes.string_at(id(own) + _HEAD, _PYTHON_BYTES))
    return own.getstate()[1] == (*words, position)


_READABLE = sys.implementation.name == "cpython" and _is_readable()


def _python_state() -> tuple[bytes, object]:
    """The state of python's generator: its memory, 20 times cheaper to read than `getstate`."""
    if not _READABLE:
        return pickle.dumps(_python.getstate()), None
    return ctypes.string_at(id(_python) + _HEAD, _PYTHON_BYTES), vars(_python)["gauss_next"]


def _restore_python(state: tuple[bytes, object]) -> None:
    if not _READABLE:
        _python.setstate(pickle.loads(state[0]))
        return
    ctypes.memmove(id(_python) + _HEAD, state[0], _PYTHON_BYTES)
    vars(_python)["gauss_next"] = state[1]


_bit_generator: Any = vars(np.random)["get_bit_generator"]  # missing in numpy's stubs


def _numpy_state() -> bytes:
    """The memory of numpy's global generator: 60 times cheaper to read than `get_state`."""
    generator = _bit_generator()
    if type(generator) is not np.random.MT19937:
        return pickle.dumps(generator.state)
    return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)


def _restore_numpy(state: bytes) -> None:
    generator = _bit_generator()
    if type(generator) is not np.random.MT19937:
        generator.state = pickle.loads(state)
        return
    with generator.lock:
        ctypes.memmove(generator.ctypes.state_address, state, len(state))


_MT19937_BYTES = 4 * 624 + 4
"""The state is 624 words and the position of the next one, by numpy's documented C interface."""
