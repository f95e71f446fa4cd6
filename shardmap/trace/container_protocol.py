"""The methods that torch.func calls on a container with a batch dimension of its own."""

from __future__ import annotations

import functools
from typing import Protocol, TypeGuard

import torch


class Container(Protocol):
    """Protocol of a container that has a batch dimension of its own, as torch.func uses it."""

    def dim(self) -> int:
        """The number of batch dimensions."""
        ...

    def size(self, dim: int, /) -> int:
        """The size of a batch dimension."""
        ...

    def _add_batch_dim(self, *, in_dim: int, vmap_level: int) -> Container: ...

    def _remove_batch_dim(self, vmap_level: int, batch_size: int, out_dim: int) -> Container: ...


@functools.lru_cache(4096)
def has_methods(kind: type) -> bool:
    """True if a class has torch.func's methods for a batch of its own kind."""
    return callable(getattr(kind, "_add_batch_dim", None))


@functools.lru_cache(4096)
def _is_kind(kind: type) -> bool:
    return has_methods(kind) and not issubclass(kind, torch.Tensor)


def is_container(value: object) -> TypeGuard[Container]:
    """True if `value` has torch.func's methods for a batch of its own kind, and is no tensor."""
    return _is_kind(type(value))
