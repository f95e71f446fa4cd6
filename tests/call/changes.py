"""The register of ways to change what a function does between two calls of its map.

Each way is a generator: it makes the function, yields it, changes something, and yields it again
(the same function object, unless python's own semantics make another one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

Way = Iterator[Callable[[Tensor], Tensor]]
WAYS: dict[str, Callable[[], Way]] = {}


def way(make: Callable[[], Way]) -> Callable[[], Way]:
    """Register a way by its name."""
    assert make.__name__ not in WAYS
    WAYS[make.__name__] = make
    return make
