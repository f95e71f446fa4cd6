"""Recognise `copy.copy(tensor)`: another tensor of the same memory, without the first's history.

Python copies a tensor as it pickles one, by its storage, which is a door. The steps of a copy are
told from those of a pickle by the code that takes them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from shardmap.program.own_backward import DATA

if TYPE_CHECKING:
    from shardmap.trace.recorder import Recorder

Tensor = torch.Tensor

STEPS = {Tensor.untyped_storage, Tensor.__reduce_ex__}
"""The doors that a copy uses."""
_FRAMES = 9
"""Frames of torch's and of ours between `copy.copy` and such a call."""


def step(
    recorder: Recorder,
    func: Callable[..., object],
    args: tuple,
    unrecorded: Callable[[Callable[..., object], tuple, dict], object],
) -> object | None:
    """The result of a step of a copy; None if a call is none.

    Args:
        recorder: The recorder.
        func: One of `STEPS`.
        args: The arguments of the call.
        unrecorded: Runs a call without recording it.
    """
    if type(args[0]) is not Tensor or not _is_copied():
        return None
    if func is Tensor.__reduce_ex__:  # a tensor with attributes of its own
        made = recorder.cut_off(DATA, args[0], args[0].data)
        made.requires_grad_(args[0].requires_grad)
        return _with_attributes, (made, dict(args[0].__dict__))
    storage = cast(torch.UntypedStorage, unrecorded(func, args, {}))
    recorder.being_copied = storage, args[0]
    return storage


def _with_attributes(tensor: Tensor, attributes: dict[str, object]) -> Tensor:
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def _is_copied() -> bool:
    """True if `copy.copy` has called, not pickle."""
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code is copy.copy.__code__:
            return True
    return False
