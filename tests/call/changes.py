"""The register of ways to change what a function does between two calls of its map.

Each way is a generator: it makes the function, yields it, changes something, and yields it again
(the same function object, unless python's own semantics make another one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

Way = Iterator[Callable[[Tensor], Tensor]]
WAYS: dict[str, Callable[[], Way]] = {}
STATES: list[str] = []
"""The names of those that `register` has made."""


def way(make: Callable[[], Way]) -> Callable[[], Way]:
    """Register a way by its name."""
    assert make.__name__ not in WAYS
    WAYS[make.__name__] = make
    return make


def scaled_by(read: Callable[[], float]) -> Callable[[Tensor], Tensor]:
    """A function that multiplies by a number that is read at each call."""
    return lambda x: x * read()


def register(
    name: str, make: Callable[[], tuple[Callable[[], float], Callable[[], object]]]
) -> None:
    """Register a way.

    Args:
        name: Its name.
        make: Returns a function that reads a number, and one that changes what it reads.
    """

    def made() -> Way:
        read, change = make()
        f = scaled_by(read)
        yield f
        change()
        yield f

    assert name not in WAYS
    STATES.append(name)
    made.__module__ = make.__module__
    WAYS[name] = made


def state(make: Callable[[], Any]) -> Callable[[], Any]:
    """Register a way by the name of what is changed."""
    register(f"state_of_{make.__name__}", make)
    return make
