"""The arguments of one mapped call, flat, and what the function returned for a sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from shardmap import errors
from shardmap.store.columns import Column


@dataclass(frozen=True, slots=True)
class Batch:
    """The arguments of one call, flat."""

    leaves: list[Any]
    """All leaves of `(args, kwargs)`: tensors and anything else."""
    structure: pytree.TreeSpec
    mapped: tuple[tuple[int, int], ...]
    """`(position among leaves, dimension)` of each mapped tensor; the dimension is never
    negative."""
    size: int
    """N, the number of samples."""
    columns: dict[int, Column] = field(default_factory=dict)
    """The mapped arguments that are read from sources, by position among the mapped; their leaf
    is the first few rows."""

    def tensors(self) -> list[torch.Tensor]:
        """The mapped tensors, each with the mapped dimension first (a view)."""
        return [self.leaves[i].movedim(d, 0) if d else self.leaves[i] for i, d in self.mapped]

    def unflatten(self, samples: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` with the mapped tensors replaced by `samples`."""
        leaves = list(self.leaves)
        for (i, _), sample in zip(self.mapped, samples, strict=True):
            leaves[i] = sample
        return pytree.tree_unflatten(leaves, self.structure)


def flatten_outputs(out: Any, call: str) -> tuple[list[torch.Tensor], pytree.TreeSpec]:
    """The tensors that the function returned.

    Raises:
        OutputError: It returned something else.
    """
    leaves, structure = pytree.tree_flatten(out)
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise errors.OutputError(
                f"{call}: the function returned a {type(leaf).__name__} ({_short(leaf)}) where a "
                "tensor is expected; return "
                "tensors (in tuples, lists "
                "or dicts): torch.as_tensor makes one of a number"
            )
    return leaves, structure


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
