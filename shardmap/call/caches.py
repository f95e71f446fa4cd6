"""The process's caches about the functions that it has mapped, cleared by one call."""

from __future__ import annotations

import os

from shardmap.call import automatic, by_shape, first_use, paths, routes, sample_draws, shapes
from shardmap.lower import cache
from shardmap.run import graphed
from shardmap.trace import repeat


def clear_caches() -> None:
    """Clear the caches of lowerings, of graphs, and of checks made when functions were mapped.

    The next call of each map records, lowers and checks as if it were the first of the process.
    A map with `trace="once"` keeps its own recordings, which stay.

    Example:
        >>> import torch, shardmap
        >>> shardmap.vmap(torch.sin)(torch.zeros(3))
        tensor([0., 0., 0.])
        >>> shardmap.clear_caches()
    """
    automatic.clear()
    by_shape.clear()
    first_use.clear()
    paths.clear()
    routes.clear()
    sample_draws.clear()
    shapes.clear()
    cache.clear()
    graphed.clear()
    repeat.clear()


def _after_fork() -> None:
    automatic.after_fork()
    by_shape.after_fork()
    first_use.after_fork()
    paths.after_fork()
    routes.after_fork()
    shapes.after_fork()
    cache.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
