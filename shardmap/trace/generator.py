"""Detect seeds that a recorded function sets, by the state of torch's generator between draws."""

from __future__ import annotations

import ctypes
import itertools
import sys
from types import FrameType

import torch

from shardmap._threads import alone
from shardmap._torch import (
    excluded_keys,
    force_keys,
    key_set,
    undefined_key,
    without_dispatch,
    without_functions,
)
from shardmap.trace.watch import PROGRAM, PythonWatch


def generator_state() -> bytes:
    """The state of torch's generator, read so that no mode sees it."""
    with without_dispatch(), without_functions():
        return bytes_of(torch.default_generator.get_state())


def bytes_of(state: torch.Tensor) -> bytes:
    """The bytes of a state, read so that no mode sees it."""
    with without_dispatch(), without_functions():
        plain = state.detach().contiguous()
        return ctypes.string_at(plain.data_ptr(), plain.numel())


class Generator:
    """Torch's generator while a function is recorded.

    `torch.manual_seed`, `torch.random.fork_rng` and checkpoints that draw set its state without an
    operator call. In the loop, later draws of all samples are then the same.
    """

    def __init__(self, watched: bool) -> None:
        """Store the state of the generator before the function runs.

        Args:
            watched: True to watch the calls that the function makes if other threads share
                the generator. That slows it down, so it is for functions that may draw.
        """
        self.alone = alone()
        self.drawn = False
        self.watch = Watch() if watched and not self.alone else None
        self.seed, self.state = torch.initial_seed(), b""
        self._states: set[int] = set()
        """Hashes of the states that it was given here, which nobody outside has read."""
        if self.alone:
            # one of three states in turn: a function that reads the state, which is not the user's
            # now, is seen to vary
            self._advance(_ENGINE * (next(_numbers) % 3 + 1))

    def _advance(self, numbers: int) -> None:
        """Draw numbers, so that even `manual_seed(initial_seed())` changes the state.

        `torch.autograd.functional` with `vectorize=True` around the call forbids to draw in the
        thread, by a key that the thread includes; these draws are no one's numbers.
        """
        with without_dispatch(), without_functions():
            drawn = torch.empty(numbers)
            try:
                drawn.uniform_()
            except RuntimeError as error:
                if "random operations" not in str(error):
                    raise
                # Only there: a signal handler would run without the thread's keys as well.
                with force_keys(key_set(undefined_key), excluded_keys()):
                    drawn.uniform_()
        self._note(generator_state())

    def _note(self, state: bytes) -> None:
        self.state = state
        self._states.add(hash(state))

    def gave(self, tensor: torch.Tensor) -> bool:
        """True if a tensor of bytes holds a state that was read while the function is recorded."""
        if tensor.numel() != len(self.state) or tensor.device.type != "cpu":
            return False
        return hash(bytes_of(tensor)) in self._states

    def _mark(self) -> None:
        """Give the generator a state that no seed and no earlier state gives.

        Recorded draws come from other generators, so without the mark a state that is put back
        would be the current one.
        """
        torch.default_generator.manual_seed(2**40 + next(_numbers))
        self._advance(1)
        with without_dispatch(), without_functions():
            # The function may ask for the seed, which is the user's. It comes first in the state.
            marked = bytearray(self.seed.to_bytes(8, sys.byteorder) + self.state[8:])
            state = torch.frombuffer(marked, dtype=torch.uint8)
            torch.default_generator.set_state(state)
        self._note(generator_state())

    def is_as_left(self) -> bool:
        """True if nothing but recorded draws has changed the state.

        All threads share torch's generator: where there are others, their draws change it as well,
        and only another seed, or a watched call that sets the state, can be detected.
        """
        if self.watch is not None and self.watch.seen:
            return False
        if torch.initial_seed() != self.seed:
            return _within_a_program()
        self.alone = self.alone and alone()
        return not self.alone or _within_a_program() or generator_state() == self.state

    def draw(self) -> None:
        """Record the state after a recorded draw."""
        self.drawn = True
        self.alone = self.alone and alone()
        if self.alone and not _within_a_program():
            self._mark()


class Watch:
    """Watches with a profile function if this thread sets the state of torch's generator.

    If python is being profiled already, it does nothing.
    """

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> None:
        self.before = sys.getprofile()
        if self.before is None:
            sys.setprofile(self._called)

    def __exit__(self, *error: object) -> None:
        if self.before is None:
            sys.setprofile(None)

    def _called(self, frame: FrameType, event: str, called: object) -> None:
        if event != "c_call" or getattr(called, "__self__", None) is not torch.default_generator:
            return
        ours = frame.f_globals.get("__name__", "").startswith("shardmap.")
        if getattr(called, "__name__", "") in _SETTERS and not ours and not _within_a_program():
            self.seen = True


def stop_watching() -> None:
    """Stop a watch of a recording that an interrupt has left active."""
    active = sys.getprofile()
    if isinstance(active, PythonWatch) or isinstance(getattr(active, "__self__", None), Watch):
        sys.setprofile(None)


_ENGINE = 624
"""Number of words in the generator's state: this many draws replace them all."""
_numbers = itertools.count()
_SETTERS = {"manual_seed", "seed", "set_state", "graphsafe_set_state", "set_offset"}


def _within_a_program() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == PROGRAM:
            return True
        frame = frame.f_back
    return False
