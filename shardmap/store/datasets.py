"""Samples from a map-style `torch.utils.data.Dataset`."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import default_collate

from shardmap.errors import SourceError
from shardmap.store import elements

_LARGE_BYTES = 16 << 20
"""Size of a pickled dataset from which its data count as in memory: rows are sent rather than all
of it to every worker."""


class _TooLargeError(Exception):
    pass


class _Counter:
    """A file that only counts the bytes written to it."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.bytes += size
        if self.bytes > _LARGE_BYTES:
            raise _TooLargeError
        return size


def importable(obj: object) -> bool:
    """True if a worker can make this object from a small pickle.

    That is so if its class can be imported there, and its pickle does not hold its data.
    """
    if type(obj).__module__ == "__main__" or "<locals>" in type(obj).__qualname__:
        return False
    try:
        pickle.Pickler(_Counter()).dump(obj)  # type: ignore[arg-type]
    except Exception:  # too large, or any error of the object's own pickling
        return False
    return True


def _columns(items: Any, what: str) -> dict[str, torch.Tensor]:
    """Convert a collated batch to named columns.

    Raises:
        SourceError: It is nested, or something in it is no tensor.
    """
    if isinstance(items, torch.Tensor):
        named: dict[str, Any] = {"0": items}
    elif isinstance(items, Mapping):
        named = {str(key): value for key, value in items.items()}
    elif isinstance(items, tuple | list):
        named = {str(i): value for i, value in enumerate(items)}
    else:
        raise SourceError(
            f"{what} gives {type(items).__name__}: items have to be tensors, numbers, or a tuple "
            "or dict of them"
        )
    for key, value in named.items():
        if not isinstance(value, torch.Tensor) or not elements.storable(value.dtype):
            raise SourceError(
                f"{what} gives {type(value).__name__} for {key!r}: items have to be tensors, "
                "numbers, or one tuple or dict of them"
            )
    return named


def fetch(dataset: Any, start: int, stop: int, what: str) -> tuple[dict[str, torch.Tensor], bool]:
    """Fetch items, collated to columns; True if the columns' names come from the items."""
    numbers = list(range(start, stop))
    many = getattr(dataset, "__getitems__", None)
    items: Any = many(numbers) if callable(many) else [dataset[i] for i in numbers]
    try:
        batch = default_collate(items)
    except (TypeError, RuntimeError, ValueError, KeyError) as error:
        raise SourceError(
            f"{what}: items {start} to {stop - 1} cannot be put side by side: {error}"
        ) from error
    return _columns(batch, what), isinstance(batch, Mapping)
