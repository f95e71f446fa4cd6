"""Locks that survive a fork, and torch's default generators, which all threads share."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import torch

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def fork_safe_lock() -> Any:
    """A reentrant lock that is free in a forked child, whoever held it in the parent.

    Reentrant, because a signal handler, a finalizer or a callback may call a map in the thread that
    holds the lock. It is python's own C object: a class of ours around it could be interrupted
    between taking the lock and recording that it did.
    """
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _free_locks() -> None:
    for lock in _locks:
        if not lock._is_owned():  # the forking thread continues, and releases its own locks
            lock._at_fork_reinit()  # what threading itself does with its locks


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_locks)


def alone() -> bool:
    """True if this is the only python thread.

    Only then may the state of a default generator be read: torch does so while it holds the
    generator's mutex, and a garbage collection at that moment (its finalizers hand the GIL to
    other threads) stops the process for good if another thread wants the mutex meanwhile.
    """
    return threading.active_count() == 1


def default_generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the default generators of the host and of `device`; none under other threads.

    Other threads draw from the same generators: to restore them would rewind those draws.
    """
    if not alone():
        return {}
    states = {"cpu": torch.default_generator.get_state()}
    if device.type == "cuda" and torch.cuda.is_available():
        states[str(device)] = torch.cuda.get_rng_state(device)
    if not _unrestored:
        _unrestored.append(states)
    return states


def restore_default_generators(states: dict[str, torch.Tensor]) -> None:
    """Restore what `default_generator_states` returned, unless other threads have started."""
    if states and alone():
        for device, state in states.items():
            if device == "cpu":
                torch.default_generator.set_state(state)
            else:
                torch.cuda.set_rng_state(state, device)
    if _unrestored and _unrestored[0] is states:
        _unrestored.clear()


_unrestored: list[dict[str, torch.Tensor]] = []
"""The outermost states that are still to be restored. If an interrupt strikes just before they are,
the call's outermost frame restores them."""


def restore_interrupted_generators() -> None:
    """Restore the states that an interrupt has kept from being restored."""
    while _unrestored:
        restore_default_generators(_unrestored[0])


def forget_interrupted_generators() -> None:
    """Drop states that no call will restore any more: a new call begins."""
    _unrestored.clear()
