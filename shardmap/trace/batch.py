"""The arguments of one mapped call, flat, and what the function returned for a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardmap import errors
from shardmap._torch import pytree
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

    def generators(self) -> list[torch.Generator]:
        """The generators among the arguments."""
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Generator)]

    def unflatten(self, samples: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` with the mapped tensors replaced by `samples`."""
        leaves = list(self.leaves)
        for (i, _), sample in zip(self.mapped, samples, strict=True):
            leaves[i] = sample
        return pytree.tree_unflatten(leaves, self.structure)


class Absent:
    """Stands for a None among the outputs: a part of their structure that holds no tensor."""

    def __repr__(self) -> str:
        return "None"


_ABSENT = Absent()
pytree.register_pytree_node(
    Absent,
    lambda _: ([], None),
    lambda _, __: _ABSENT,
    flatten_with_keys_fn=lambda _: ([], None),
    serialized_type_name="shardmap.trace.batch.Absent",
)


def flatten_outputs(out: Any, call: str) -> tuple[list[torch.Tensor], pytree.TreeSpec]:
    """The tensors that the function returned, and their structure.

    A None beside tensors belongs to the structure, and is no leaf of it.

    Raises:
        OutputError: It returned something else.
    """
    leaves, structure = pytree.tree_flatten(out)
    if any(leaf is None for leaf in leaves) and not all(leaf is None for leaf in leaves):
        marked = [_ABSENT if leaf is None else leaf for leaf in leaves]
        leaves, structure = pytree.tree_flatten(pytree.tree_unflatten(marked, structure))
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise errors.OutputError(
                f"{call}: the function returned a {type(leaf).__name__} ({_short(leaf)}) where a "
                "tensor is expected; return tensors (in tuples, lists or dicts): torch.as_tensor "
                "makes one of a number"
            )
    return leaves, structure


def unflatten_outputs(outputs: Sequence[Any], structure: pytree.TreeSpec) -> Any:
    """What the mapped function returns: `outputs` in the structure of one sample's, and its Nones.

    `pytree.tree_unflatten` leaves an `Absent` for each None, so that the structure keeps its
    number of leaves when it is flattened again.
    """
    tree = pytree.tree_unflatten(outputs, structure)
    if not _has_absent(structure):
        return tree
    is_absent = lambda part: isinstance(part, Absent)  # noqa: E731
    return pytree.tree_map(lambda p: None if is_absent(p) else p, tree, is_leaf=is_absent)


def _has_absent(structure: pytree.TreeSpec) -> bool:
    return structure.type is Absent or any(map(_has_absent, structure.children()))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
