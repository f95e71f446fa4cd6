"""What every executor shares: the events it reports while it runs."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A map begins: how many samples, in how many chunks."""

    samples: int
    chunks: int
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """One chunk was computed."""

    device: str
    start: int
    stop: int
    seconds: float
    """Wall time on the host between hand-out and completion."""


@dataclass(frozen=True, slots=True)
class RunFinished:
    """All chunks are computed and gathered."""

    seconds: float


Event = RunStarted | ChunkDone | RunFinished
Listener = Callable[[Event], None]

_listeners: contextvars.ContextVar[tuple[Listener, ...]] = contextvars.ContextVar("shardmap_listeners", default=())


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Report the events of every map that runs inside this context to `listener`."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def emit(event: Event) -> None:
    """Report `event` to the listeners of the current context."""
    for listener in _listeners.get():
        listener(event)
