"""The state of the process around a recording: what is set aside while it runs, and put back afterwards."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from shardmap._torch import (
    cudnn,
    dispatch_modes,
    enter_vmap_level,
    function_modes,
    functorch,
    interpreters_aside,
    leave_vmap_level,
    pop_dispatch_mode,
    pop_function_mode,
    push_dispatch_mode,
    push_function_mode,
    transformer_fast_paths,
)
from shardmap.trace.escapes import Doors
from shardmap.trace.recorder import Recorder


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
                yield depth
            finally:
                for _ in range(depth):
                    leave_vmap_level()
    finally:
        functorch.set_inplace_requires_grad_allowed(allowed)


@contextlib.contextmanager
def recording_settings(device_type: str) -> Iterator[None]:
    """Kernels that exist on one device only are off while recording.

    Recurrent layers and transformer fast paths.
    """
    with (
        transformer_fast_paths.off(),
        cudnn.off() if device_type == "cuda" else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Recording makes many small tuples at once, and the collector would look at all of them time and again: it cost 40% of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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


class RandomStates:
    """The global random states, compared and put back."""

    def __init__(self, device: torch.device):
        self.device = device
        self.torch = torch.default_generator.get_state()
        self.accelerator = (
            torch.cuda.get_rng_state(device)
            if device.type == "cuda" and torch.cuda.is_available()
            else None
        )
        self.python = random.getstate()
        self.numpy: Any = np.random.get_state()

    def restore(self) -> str | None:
        """Put the states back; names a python source of random numbers that was drawn from."""
        torch.default_generator.set_state(self.torch)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)
        drawn = None
        if random.getstate() != self.python:
            random.setstate(self.python)
            drawn = "random"
        now: Any = np.random.get_state()
        if now[2] != self.numpy[2] or not np.array_equal(now[1], self.numpy[1]):
            np.random.set_state(self.numpy)
            drawn = "numpy.random"
        return drawn
