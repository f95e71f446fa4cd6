"""Lazy stacks of tensordict: batches that are lists of their samples, mapped over the list.

This module does not import tensordict, which is optional: if it has not been imported, there are no
lazy stacks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

import torch

from shardmap._torch import pytree
from shardmap.trace.container_protocol import Container


class LazyStack(Container, Protocol):
    """Protocol of a lazy stack."""

    is_locked: bool
    stack_dim: int
    tensordicts: Sequence[Container]
    batch_size: torch.Size

    def tolist(self) -> object:
        """The data of a stack that holds no tensors."""
        ...

    def unbind(self, dim: int) -> Sequence[Any]:
        """Its elements along a dimension."""
        ...


def is_one(value: object) -> TypeGuard[LazyStack]:
    """True if `value` is a lazy stack."""
    tensordict = sys.modules.get("tensordict")
    return tensordict is not None and isinstance(value, tensordict.LazyStackedTensorDict)


def stack(samples: Sequence[object], dim: int) -> Container:
    """A lazy stack of the samples."""
    return sys.modules["tensordict"].LazyStackedTensorDict.lazy_stack(samples, dim)


def gathered(value: Any, dim: int) -> tuple[Container, bool]:
    """`value` with each lazy stack along the mapped dimension made one batch.

    Args:
        value: A container of any kind.
        dim: The dimension of samples; lists along other dimensions are left as they are.

    Returns:
        The container, `value` itself if it has no list of samples, and True if `value` is one.

    Raises:
        ValueError: The samples do not fit in one batch; the message has the reason.
    """
    tensordict = sys.modules.get("tensordict")
    if tensordict is None or not isinstance(value, tensordict.TensorDictBase):
        if tensordict is None or not tensordict.is_tensorclass(value):
            return value, False
    if getattr(value, "_is_non_tensor", False):
        return (_alike(value) if is_one(value) else value), False
    inside = getattr(value, "_tensordict", None) if tensordict.is_tensorclass(value) else value
    if is_one(inside) and inside.stack_dim == dim:
        samples = value.unbind(dim)
        _refuse_unequal(samples)
        return gathered(torch.stack(samples, dim), dim)[0], True
    if is_one(inside):
        below = dim if dim < inside.stack_dim else dim - 1
        found = [gathered(part, below)[0] for part in inside.tensordicts]
        if all(a is b for a, b in zip(found, inside.tensordicts, strict=True)):
            return value, False
        return tensordict.LazyStackedTensorDict(*found, stack_dim=inside.stack_dim), False
    changed = {}
    for key, part in value.items():
        found, _ = gathered(part, dim)
        if found is not part:
            changed[key] = found
    if not changed:
        return value, False
    own = value.copy()
    for key, part in changed.items():
        own.set(key, part)
    return own, False


def _refuse_unequal(samples: Sequence[object]) -> None:
    """Refuse samples that hold different keys, or tensors of unequal shapes or dtypes."""
    first = None
    for number, sample in enumerate(samples):
        found = {
            ".".join(str(getattr(key, "key", key)) for key in path): (tuple(t.shape), t.dtype)
            for path, t in pytree.tree_flatten_with_path(sample)[0]
            if hasattr(t, "dtype")
        }
        first = found if first is None else first
        for key in sorted(first.keys() ^ found.keys()):
            raise ValueError(
                f"its samples 0 and {number} do not hold the same keys (only one has {key!r}); "
                "give all samples the same keys, or call the function in a loop"
            )
        for key in first:
            if first[key] != found[key]:
                raise ValueError(
                    f"{key!r} has shape {first[key][0]} and {first[key][1]} in sample 0 and "
                    f"{found[key][0]} and {found[key][1]} in sample {number}; pass the unequal "
                    "tensors as a shardmap.Ragged argument of their own, or pad them"
                )


def _alike(value: LazyStack) -> Container:
    """The data of a stack without tensors, if they are the same in the whole batch."""
    elements: list[object] = [value.tolist()]
    for _ in range(value.dim()):
        elements = [part for element in elements for part in _listed(element)]
    texts = list(dict.fromkeys(map(repr, elements)))
    if len(texts) > 1:
        raise ValueError(
            f"it holds data that is no tensor and differs within the batch ({texts[0]} and "
            f"{texts[1]}); pass it without that entry (.exclude), or call the function in a loop"
        )
    if not texts:
        return value
    kind = sys.modules["tensordict"].NonTensorData
    return kind(data=elements[0], batch_size=value.batch_size)


def _listed(element: object) -> list[object]:
    return element if isinstance(element, list) else [element]
