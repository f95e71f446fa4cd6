"""The private parts of torch that more than one file needs, in one place.

They move between versions.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

functorch: Any = torch._C._functorch  # type: ignore[reportAttributeAccessIssue] - a C extension without stubs

has_internal_overlap: Any = torch._debug_has_internal_overlap  # type: ignore[reportPrivateImportUsage] - 1: two elements share memory


_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def fork_safe_lock() -> Any:
    """A reentrant lock that is free in a forked child, whoever held it in the parent.

    Reentrant, because a signal handler, a finalizer or a callback may call a map in the thread that
    holds the lock. It is python's own C object: a class of ours around it could be interrupted
    between taking the lock and saying so.
    """
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _free_locks() -> None:
    for lock in _locks:
        if not lock._is_owned():  # the thread that forked goes on, and releases what it holds
            lock._at_fork_reinit()  # what threading itself does with its locks


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_locks)


def alone() -> bool:
    """Whether this is the only python thread.

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
    return states


def restore_default_generators(states: dict[str, torch.Tensor]) -> None:
    """Restore what `default_generator_states` returned, unless other threads have started."""
    if not states or not alone():
        return
    for device, state in states.items():
        if device == "cpu":
            torch.default_generator.set_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


__all__ = [
    "alone",
    "default_generator_states",
    "dispatch_modes",
    "fork_safe_lock",
    "functorch",
    "has_internal_overlap",
    "restore_default_generators",
]
