"""Seeds that a recorded function sets, found by the state of torch's generator between draws."""

from __future__ import annotations

import sys
import threading
import zlib

import torch

from shardmap._torch import without_dispatch, without_functions

PROGRAM = "<shardmap program>"
"""The file name of replayed programs: an inner map sets seeds of its own while it draws."""


def generator_state() -> bytes:
    """The state of torch's generator, read so that no mode sees it."""
    with without_dispatch(), without_functions():
        return torch.default_generator.get_state().numpy().tobytes()


class Generator:
    """Torch's generator while a function is recorded.

    `torch.manual_seed`, `torch.random.fork_rng` and checkpoints that draw set its state without an
    operator call. In the loop, later draws of all samples are then the same.
    """

    def __init__(self) -> None:
        """Give the generator a state that no seed of the function's gives by chance."""
        self.alone = threading.active_count() == 1
        if self.alone:
            torch.default_generator.manual_seed(zlib.crc32(generator_state()) + 2**40)
        self.seed = torch.initial_seed()
        self.state = generator_state() if self.alone else b""
        self.drawn = False

    def is_as_left(self) -> bool:
        """Whether nothing but recorded draws has changed the state.

        All threads share torch's generator: where there are others, their draws change it as well,
        and only another seed can be told.
        """
        if torch.initial_seed() != self.seed:
            return _within_a_program()
        self.alone = self.alone and threading.active_count() == 1
        return not self.alone or _within_a_program() or generator_state() == self.state

    def draw(self) -> None:
        """Note the state after a recorded draw."""
        self.drawn = True
        if self.alone and not _within_a_program():
            self.state = generator_state()


def _within_a_program() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == PROGRAM:
            return True
        frame = frame.f_back
    return False
