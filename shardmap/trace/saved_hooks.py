"""Hooks on what autograd saves that are active around the call of a map.

They are for what the map itself saves. What is saved while the function is recorded or tried is
dropped at once: hooks that count what they are given (`torch.utils.checkpoint`), or that write it
to a disk, must not see it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.utils import checkpoint

from shardmap._torch import (
    pop_saved_hooks,
    push_saved_hooks,
    saved_hooks,
    why_saved_hooks_are_refused,
)


@contextlib.contextmanager
def saved_hooks_set_aside() -> Iterator[None]:
    """Let the hooks around the body see nothing of what is saved in it."""
    around = []
    try:
        while (top := saved_hooks(True)) is not None:
            around.append(top)
            pop_saved_hooks()
        yield
    finally:
        for pack, unpack in reversed(around):
            push_saved_hooks(pack, unpack)


def are_saved_hooks_around() -> bool:
    """True if there are such hooks: two calls are then to save the same, whatever is known."""
    return saved_hooks(True) is not None


def is_checkpoint_around() -> bool:
    """True if a checkpoint hands out what autograd saves, in the order in which it is saved.

    The call is made again in backward, and must then save the same tensors in the same order.
    """
    top = saved_hooks(True)
    return top is not None and getattr(top[0], "__module__", "") == checkpoint.__name__


Hooks = tuple[Callable[[torch.Tensor], object], Callable[[object], torch.Tensor]]
"""A pack hook and an unpack hook."""


def changing_hooks() -> Hooks | None:
    """The hooks through which autograd saves now; None if there are none, or a checkpoint's.

    A checkpoint gives back what it was given, by computing it again.
    """
    return None if is_checkpoint_around() else saved_hooks(True)


@contextlib.contextmanager
def integers_kept() -> Iterator[None]:
    """Keep integers that the body saves from hooks that may change what they are given.

    A map sorts samples by indices of its own, which the loop does not save: rounded to `bfloat16`
    they would lead to other samples.
    """
    hooks = changing_hooks()
    if hooks is None or why_saved_hooks_are_refused() is not None:
        yield
        return
    pack, unpack = hooks

    def packed(tensor: torch.Tensor) -> tuple[torch.Tensor | None, object]:
        if tensor.is_floating_point() or tensor.is_complex():
            return None, pack(tensor)
        return tensor, None

    def unpacked(held: tuple[torch.Tensor | None, object]) -> torch.Tensor:
        kept, given = held
        return unpack(given) if kept is None else kept

    push_saved_hooks(packed, unpacked)
    try:
        yield
    finally:
        pop_saved_hooks()


@contextlib.contextmanager
def also_through(hooks: Hooks) -> Iterator[None]:
    """Let what is saved in the body pass through `hooks`, once it is unpacked by those around."""
    (pack, unpack), (pack_first, unpack_first) = saved_hooks(True), hooks
    push_saved_hooks(pack, lambda held: unpack_first(pack_first(unpack(held))))
    try:
        yield
    finally:
        pop_saved_hooks()
