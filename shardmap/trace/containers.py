"""Containers with a batch dimension of their own (TensorDict): opened and built again.

`torch.func` handles such a container by its methods: `_add_batch_dim(in_dim=, vmap_level=)` gives
one sample, whose tensors hide the mapped dimension, and `_remove_batch_dim` shows it again. Here
the first tells which tensors of the container are mapped over which dimension, and how a container
of one sample is built; the second makes the container of all results. In between there are only
tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard, cast

import torch

from shardmap import errors
from shardmap._torch import (
    add_batch_dim,
    enter_vmap_level,
    functorch,
    leave_vmap_level,
    pytree,
)
from shardmap.trace import lazy_stacks
from shardmap.trace.container_protocol import Container, has_methods, is_container


@dataclass(frozen=True, slots=True)
class Layout:
    """The structure of a container without its tensors."""

    structure: pytree.TreeSpec
    kind: type | None
    """The class of a container that pytrees do not know; it is rebuilt from its attributes."""
    names: tuple[str, ...]
    """Names of its tensors."""
    ndim: int
    """Number of batch dimensions."""
    constants: tuple[tuple[int, Constant], ...] = ()
    """Parts of a result that are no tensors, each with its position among the leaves."""
    locked: bool = False
    """True if it is a sample that refuses new entries."""
    from_stack: bool = False
    """True if it is an element of a lazy stack; its results are put in such a stack."""

    def build(self, leaves: Sequence[object]) -> Container:
        """The container that holds `leaves`."""
        held = list(leaves)
        for i, constant in self.constants:
            held.insert(i, constant.value)
        tree = pytree.tree_unflatten(held, self.structure)
        if self.kind is not None:
            value = object.__new__(self.kind)
            vars(value).update(tree)
            tree = value
        if self.locked:
            tree.lock_()
        if self.from_stack:
            _elements[id(tree)] = tree
        return tree


class Opened:
    """An opened container, as a node of a pytree: its tensors, and its layout."""

    __slots__ = ("layout", "leaves")

    def __init__(self, leaves: Sequence[torch.Tensor], layout: Layout):
        self.leaves = list(leaves)
        self.layout = layout

    @property
    def kind(self) -> str:
        """The name of the container's class."""
        return (self.layout.kind or self.layout.structure.type).__name__

    def named(self) -> list[tuple[str, torch.Tensor]]:
        """Its tensors, each with its name."""
        return list(zip(self.layout.names, self.leaves, strict=True))

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={leaf!r}' for name, leaf in self.named())})"

    def build(self) -> object:
        """The container of one sample, or of results without a dimension of samples.

        It is a dict by name if some results are None, which happens if only one of them holds the
        result (`reduce="gram"`).
        """
        if any(leaf is None for leaf in self.leaves):
            return dict(self.named())
        return self.layout.build(self.leaves)

    def stacked(self, dims: Sequence[int | None], size: int) -> object:
        """The container of all results, whose tensors have the samples first.

        Args:
            dims: Position of the mapped dimension in the container, once per tensor; None if
                there is none.
            size: N, the number of samples.
        """
        dim = dims[0] if dims else 0
        assert all(d == dim for d in dims), dims
        if dim is None:
            return self.build()
        if self.layout.from_stack:
            rows = zip(*[leaf.unbind(0) for leaf in self.leaves], strict=True)
            plain = dataclasses.replace(self.layout, from_stack=False)
            return lazy_stacks.stack([plain.build(row) for row in rows], dim)
        with _level(size) as level:
            hidden = [
                add_batch_dim(leaf, 0, level) if isinstance(leaf, torch.Tensor) else leaf
                for leaf in self.leaves
            ]
            value = self.layout.build(hidden)
            return value._remove_batch_dim(vmap_level=level, batch_size=size, out_dim=dim)


class Constant:
    """A part of a result that holds no tensor; constants with the same text are equal."""

    __slots__ = ("value",)

    def __init__(self, value: object):
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


def _with_keys(value: Opened) -> tuple[list[tuple[pytree.KeyEntry, torch.Tensor]], Layout]:
    # Torch's keys differ from its own protocol of them in the name of a parameter.
    keys = [cast(pytree.KeyEntry, pytree.MappingKey(name)) for name in value.layout.names]
    return list(zip(keys, value.leaves, strict=True)), value.layout


pytree.register_pytree_node(
    Opened,
    lambda value: (value.leaves, value.layout),
    lambda leaves, layout: Opened(list(leaves), layout),
    flatten_with_keys_fn=_with_keys,
    serialized_type_name=f"{__name__}.Opened",
)

_elements: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
"""Samples that are elements of lazy stacks, by `id`."""


@contextlib.contextmanager
def _level(size: int) -> Iterator[int]:
    """Context of a vmap level of torch.func, in which nothing is computed."""
    level = enter_vmap_level(max(size, 1), "error")
    try:
        yield level
    finally:
        leave_vmap_level()


def _flat(value: object) -> tuple[list[torch.Tensor], pytree.TreeSpec, type | None, list[str]]:
    """The leaves of a container, its structure, its class if pytrees lack it, and leaf names."""
    kind = None if type(value) in pytree.SUPPORTED_NODES else type(value)
    tree = value if kind is None else dict(vars(value))
    leaves, structure = pytree.tree_flatten(tree)
    try:
        paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:  # of a class that names no keys
        return leaves, structure, kind, [str(i) for i in range(len(leaves))]
    return leaves, structure, kind, [joined(path) for path in paths]


def joined(path: Sequence[object]) -> str:
    """The keys of a path in a pytree, joined by dots."""
    keys = [
        next(v for v in (getattr(key, a, None) for a in ("key", "idx", "name")) if v is not None)
        for key in path
    ]
    return ".".join(map(str, keys))


def opened(value: Container, call: str) -> Opened:
    """Open a container that was returned for one sample.

    Raises:
        OutputError: It holds a tensor that has no dimension for the samples.
    """
    leaves, structure, kind, names = _flat(value)
    for leaf, name in zip(leaves, names, strict=True):
        if isinstance(leaf, torch.Tensor) and has_methods(type(leaf)):
            raise errors.OutputError(
                f"{call}: the function returned a {type(value).__name__} whose {name!r} is a "
                f"{type(leaf).__name__}, which has no dimension for the samples; leave it out of "
                "what is returned (.exclude), or return a plain tensor"
            )
    constants = tuple(
        [(i, Constant(v)) for i, v in enumerate(leaves) if not isinstance(v, torch.Tensor)]
    )
    for i, _ in reversed(constants):
        del leaves[i], names[i]
    of_stack = _elements.get(id(value)) is value
    layout = Layout(structure, kind, tuple(names), value.dim(), constants, from_stack=of_stack)
    return Opened(leaves, layout)


def open_batch(value: Container, dim: int) -> tuple[Opened, list[int | None], bool]:
    """Open a container that is mapped over one of its batch dimensions.

    Args:
        value: The container.
        dim: The mapped dimension, not negative.

    Returns:
        The container of one sample, with the tensors of the whole batch; the dimension over
        which each is mapped, None for one that is not; and True if tensors are copies.

    Raises:
        ValueError: The samples do not fit in one batch; the message has the reason.
    """
    dense, stack = lazy_stacks.gathered(value, dim)
    with _level(value.size(dim)) as level:
        sample = dense._add_batch_dim(in_dim=dim, vmap_level=level)
        leaves, structure, kind, names = _flat(sample)
        dims: list[int | None] = []
        for i, leaf in enumerate(leaves):
            hidden = isinstance(leaf, torch.Tensor) and functorch.maybe_get_level(leaf) == level
            dims.append(functorch.maybe_get_bdim(leaf) if hidden else None)
            if hidden:
                leaves[i] = functorch.get_unwrapped(leaf)
            elif is_container(leaf) and not getattr(leaf, "_is_non_tensor", False):
                raise ValueError(
                    f"it holds a {type(leaf).__name__}, which pytrees do not know; register the "
                    "class with torch.utils._pytree.register_pytree_node"
                )
        ndim = sample.dim()
    locked = lazy_stacks.is_one(value) and value.is_locked
    layout = Layout(structure, kind, tuple(names), ndim, (), locked, stack)
    return Opened(leaves, layout), dims, dense is not value


def built(tree: object) -> pytree.PyTree:
    """A tree with the opened containers of one sample built."""
    return pytree.tree_map(
        lambda part: part.build() if isinstance(part, Opened) else part, tree, is_leaf=is_opened
    )


def is_opened(part: object) -> TypeGuard[Opened]:
    """True if a part of a tree is an opened container."""
    return isinstance(part, Opened)


def refuse_unequal(outputs: Sequence[object], structure: pytree.TreeSpec, call: str) -> None:
    """Refuse a container whose results have unequal shapes.

    Raises:
        OutputError: It names the container.
    """
    for part in pytree.tree_leaves(pytree.tree_unflatten(outputs, structure), is_leaf=is_opened):
        names = [n for n, t in part.named() if not _is_dense(t)] if is_opened(part) else []
        if is_opened(part) and names:
            raise errors.OutputError(
                f"{call}: the function returns a {part.kind}, a batch of equal tensors, and "
                f"{names[0]!r} of it has unequal shapes; return its tensors in a dict"
            )


def _is_dense(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_nested


def contains(structure: pytree.TreeSpec, *kinds: type) -> bool:
    """True if a structure has nodes of these kinds."""
    if structure.num_nodes == structure.num_leaves + 1:  # a plain tuple: none of its leaves is one
        return structure.type in kinds
    return structure.type in kinds or any(contains(c, *kinds) for c in structure.children())
