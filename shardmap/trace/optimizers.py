"""The state of optimizers that take a step while a function is recorded, put back if it fails.

A step makes an optimizer's state at its first call, from the recorded sample's gradients, before
it writes to a parameter, which is refused.
"""

from __future__ import annotations

import sys
import types
from typing import NamedTuple

import torch
from torch.optim import Optimizer

_FILE = sys.modules[Optimizer.__module__].__file__
_DEPTH = 6
"""Most frames between an optimizer's step and torch's switch of grad mode that it turns."""


Entries = dict[str, object]


class _Before(NamedTuple):
    optimizer: Optimizer
    state: list[tuple[torch.Tensor, Entries, Entries]]
    """For each parameter: the dict of its entries, and the entries."""
    groups: list[Entries]


class Optimizers:
    """The optimizers that have taken a step, as they were before."""

    def __init__(self) -> None:
        self._before: dict[int, _Before] = {}

    def note(self, frame: types.FrameType | None) -> None:
        """Note the optimizer in whose step grad mode is switched, if it is switched in one.

        Args:
            frame: The frame that switches it.
        """
        for _ in range(_DEPTH):
            if frame is None:
                return
            if frame.f_code.co_filename == _FILE:
                optimizer = frame.f_locals.get("self")
                if isinstance(optimizer, Optimizer) and id(optimizer) not in self._before:
                    self._before[id(optimizer)] = _before(optimizer)
                    return
            frame = frame.f_back

    def forget(self) -> None:
        """Hold none of them any more: the recording has not failed."""
        self._before.clear()

    def put_back(self) -> None:
        """Put the state back, in the dicts that held it."""
        for optimizer, state, groups in self._before.values():
            optimizer.state.clear()
            for parameter, held, entries in state:
                _refill(held, entries)
                optimizer.state[parameter] = held
            for group, entries in zip(optimizer.param_groups, groups, strict=False):
                _refill(group, entries)
        self._before.clear()


def _before(optimizer: Optimizer) -> _Before:
    state = [(parameter, held, _copied(held)) for parameter, held in optimizer.state.items()]
    return _Before(optimizer, state, [_copied(group) for group in optimizer.param_groups])


def _copied(entries: Entries) -> Entries:
    """Entries with lists of their own; tensors are written in place only, which is refused."""
    return {key: list(v) if type(v) is list else v for key, v in entries.items()}


def _refill(held: Entries, entries: Entries) -> None:
    for key, value in entries.items():
        now = held.get(key)
        if type(now) is list and type(value) is list:  # others may hold the list
            now[:] = value
        else:
            held[key] = value
    for key in held.keys() - entries.keys():
        del held[key]
