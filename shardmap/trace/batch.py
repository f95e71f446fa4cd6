"""The flattened arguments of one mapped call, and the flattened results for a sample."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from shardmap import errors
from shardmap._torch import pytree, without_functions
from shardmap.store.columns import Column
from shardmap.trace import containers
from shardmap.trace.container_protocol import is_container
from shardmap.trace.containers import Opened


@dataclass(frozen=True, slots=True)
class Batch:
    """The flattened arguments of one call."""

    leaves: list[Any]
    """All leaves of `(args, kwargs)`: tensors and anything else."""
    structure: pytree.TreeSpec
    mapped: tuple[tuple[int, int], ...]
    """`(position among leaves, dimension)` of each mapped tensor; the dimension is never
    negative."""
    size: int
    """N, the number of samples."""
    columns: dict[int, Column] = field(default_factory=dict)
    """The mapped arguments that are read from sources, by position among the mapped; their leaf is
    the first few rows."""
    copies: frozenset[int] = frozenset()
    """The mapped arguments that are copies of the caller's tensors, by position among the
    mapped."""
    opened: bool = False
    """True if the structure has opened containers that must be built again."""

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
        tree = pytree.tree_unflatten(leaves, self.structure)
        return containers.built(tree) if self.opened else tree


class Absent:
    """Placeholder for a None among the outputs: a part of their structure without a tensor."""

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


class Subclassed:
    """A tensor of a subclass among a function's results, as a node of a pytree."""

    __slots__ = ("kind", "leaf")

    def __init__(self, leaf: object, kind: type[torch.Tensor]):
        self.leaf = leaf
        self.kind = kind

    def stacked(self) -> object:
        """The results of all samples, in the class that `torch.stack` gives them."""
        return _in_class(self.leaf, self.kind)


def _in_class(leaf: object, kind: type[torch.Tensor]) -> object:
    """A result in a class; for one of unequal samples, each sample's in it."""
    if isinstance(leaf, list):
        return [_in_class(part, kind) for part in leaf]
    return leaf.as_subclass(kind) if isinstance(leaf, torch.Tensor) else leaf


def unsubclassed(leaf: object) -> object:
    """A result without the class that a captured tensor or the batch has handed on in a replay.

    The class of a result is that of the function's own result: a `Subclassed` in its structure.
    """
    if isinstance(leaf, list):
        return [unsubclassed(part) for part in leaf]
    return without_class(leaf) if isinstance(leaf, torch.Tensor) else leaf


def without_class(t: torch.Tensor) -> torch.Tensor:
    """A tensor as a plain one, if torch's functions would hand its class on."""
    kind = type(t)
    if kind is torch.Tensor or not _keeps_its_class(kind):
        return t
    return t.as_subclass(torch.Tensor)


def _with_key(value: Subclassed) -> tuple[list[tuple[pytree.KeyEntry, object]], Any]:
    # Torch's keys differ from its own protocol of them in the name of a parameter.
    return [(cast(pytree.KeyEntry, pytree.SequenceKey(0)), value.leaf)], value.kind


pytree.register_pytree_node(
    Subclassed,
    lambda value: ([value.leaf], value.kind),
    lambda leaves, kind: Subclassed(next(iter(leaves)), kind),
    flatten_with_keys_fn=_with_key,
    serialized_type_name="shardmap.trace.batch.Subclassed",
)


def _keeps_its_class(kind: type[torch.Tensor]) -> bool:
    """True if torch's functions of tensors of a class return tensors of that class."""
    return all(
        getattr(found, "__func__", found) is getattr(plain, "__func__", plain)
        for found, plain in zip(_handlers(kind), _handlers(torch.Tensor), strict=True)
    )


def _handlers(kind: type[torch.Tensor]) -> list[object]:
    return [getattr(kind, name) for name in ("__torch_function__", "__torch_dispatch__")]


def recorded_part(t: torch.Tensor) -> torch.Tensor:
    """The same memory without `__torch_function__` of the tensor's class, whose work is recorded.

    A replay that called it again would do that work twice. A class with a dispatch of its own
    holds what only it can compute with, and is left as it is.
    """
    kind = type(t)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return t
    function, dispatch = (getattr(f, "__func__", f) for f in _handlers(kind))
    plain, undispatched = (getattr(f, "__func__", f) for f in _handlers(torch.Tensor))
    if function is plain or dispatch is not undispatched:
        return t
    with without_functions():
        return t.as_subclass(torch.Tensor)


def flatten_outputs(out: object, call: str) -> tuple[list[torch.Tensor], pytree.TreeSpec]:
    """The tensors that the function returned, and their structure.

    A python number becomes a tensor, as `torch.as_tensor` makes it. A None among tensors belongs
    to the structure, and is no leaf of it.

    Raises:
        OutputError: It returned something else.
    """
    if type(out) is tuple and all(map(_is_plain, out)):
        return [*out], _tuple_of(len(out))
    leaves, structure = pytree.tree_flatten(out, is_leaf=is_container)
    if not all(map(_is_plain, leaves)):
        nothing = all(leaf is None for leaf in leaves)
        parts = [leaf if nothing else _as_part(leaf, call) for leaf in leaves]
        leaves, structure = pytree.tree_flatten(pytree.tree_unflatten(parts, structure))
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            kind = type(leaf).__name__
            remedy = "torch.as_tensor makes a tensor of an array"
            if dataclasses.is_dataclass(leaf):
                remedy = f"torch.utils._pytree.register_dataclass({kind}) makes it one of these"
            raise errors.OutputError(
                f"{call}: the function returned a {kind} ({_short(leaf)}) where a tensor is "
                f"expected; return tensors and numbers (in tuples, lists or dicts): {remedy}"
            )
    return leaves, structure


@functools.lru_cache
def _tuple_of(number: int) -> pytree.TreeSpec:
    """The structure of a tuple of tensors."""
    return pytree.tree_structure((0,) * number)


def _is_plain(leaf: object) -> bool:
    return type(leaf) is torch.Tensor


def _as_part(leaf: object, call: str) -> object:
    """Convert a leaf of a function's result to a tensor, a placeholder or an opened container."""
    if leaf is None:
        return _ABSENT
    if isinstance(leaf, torch.Tensor):
        kind = type(leaf)
        return Subclassed(leaf, kind) if not _is_plain(leaf) and _keeps_its_class(kind) else leaf
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return torch.as_tensor(leaf)
    return containers.opened(leaf, call) if is_container(leaf) else leaf


_NODES = Absent, Opened, Subclassed


def unflatten_outputs(
    outputs: Sequence[object],
    structure: pytree.TreeSpec,
    dims: Sequence[int | None],
    size: int,
) -> pytree.PyTree:
    """Build the mapped function's result: `outputs` in the structure of one sample's, with Nones.

    `pytree.tree_unflatten` leaves an `Absent` for each None, so that the structure keeps its
    number of leaves when it is flattened again, and an `Opened` for each container.

    Args:
        outputs: The results.
        structure: Structure of the function's result for one sample.
        dims: Position of the mapped dimension in each result; for the tensors of a container,
            its position in the container (it is first in the tensors).
        size: N, the number of samples.
    """
    if not all(map(_is_plain, outputs)):
        outputs = [unsubclassed(output) for output in outputs]
    if structure.type is tuple and structure.num_nodes == len(outputs) + 1:
        return tuple(outputs)
    tree = pytree.tree_unflatten(outputs, structure)
    if not containers.contains(structure, Absent, Opened, Subclassed):
        return tree
    where = iter(dims)
    whole = {id(output) for output in outputs}  # a list of unequal results is one of them

    def finished(part: object) -> object:
        if isinstance(part, Opened):
            return part.stacked([next(where) for _ in part.leaves], size)
        if isinstance(part, Absent):
            return None
        next(where)
        if isinstance(part, Subclassed):
            return part.stacked()
        return part

    return pytree.tree_map(
        finished, tree, is_leaf=lambda p: isinstance(p, _NODES) or id(p) in whole
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
