"""Indexing with an integer tensor that differs by sample: `logits[label]`, `table[i] += x`.

Python turns a tensor without dimensions into an int and takes a view at that place. Here the place
differs by sample, so that it is a copy and a write by index (`index_put_`). The recorder is told
which copy replaces which view: where the function could notice the difference, because one
was written and the other is read afterwards, the call is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch

from shardmap._torch import aten
from shardmap.program.schema import span
from shardmap.trace.recording import element

Tensor = torch.Tensor
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


class Place(NamedTuple):
    """A tensor index without dimensions, and the dimension of the source that it is for."""

    at: int
    """Position in the tuple of indices."""
    dim: int
    index: Tensor


class Copy(NamedTuple):
    """A copy that replaces a view."""

    source: int
    """Memory group of the tensor that it was taken from."""
    copy: int
    """Memory group of the copy."""
    indices: tuple[Any, ...]
    dense: bool = True
    """True if no two elements of the source lie at one place in memory."""

    def is_at(self, indices: tuple[Any, ...]) -> bool:
        """True if it was taken with the same indices.

        They are the same objects, or equal ones that are no tensors.
        """
        return len(indices) == len(self.indices) and all(
            a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
            for a, b in zip(self.indices, indices, strict=True)
        )

    def is_like(self, indices: tuple[object, ...]) -> bool:
        """True if a view with these indices would be the same one, or share no element with it.

        They differ in numbers only, as `x[i]` and `x[j]` do.
        """
        return (
            self.dense
            and len(indices) == len(self.indices)
            and all(
                a is b or (_is_number(a) and _is_number(b)) or (_is_plain(a, b) and a == b)
                for a, b in zip(self.indices, indices, strict=True)
            )
        )


def _is_number(index: object) -> bool:
    return isinstance(index, Tensor) and index.dim() == 0 and index.dtype in INTEGERS


def _is_plain(a: object, b: object) -> bool:
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)


def is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """True if no two elements lie at one place, as those of `unfold` and `expand` do."""
    reach = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1:
            if stride < reach:
                return False
            reach = stride * size
    return True


class Copies:
    """The copies that replace views.

    It also lists memory that must not be read any more, because the other of a pair was
    written.
    """

    def __init__(self) -> None:
        self.pairs: list[Copy] = []
        self.stale: dict[int, int] = {}
        """Memory groups that would have changed if the copies were views, and the number of the
        first call that must not read each."""

    def add(self, source: int, copy: int, indices: tuple[Any, ...], dense: bool) -> None:
        """Record that the memory `copy` replaces the view `source[indices]`."""
        self.pairs.append(Copy(source, copy, indices, dense))

    def written(self, group: int, number: int, pointwise: bool) -> list[int]:
        """Record that call `number` writes a group; return the sources that it would reach.

        A view at another place may be the same one. A call that works element by element may
        read that while it writes: `x[i] += x[j]`.
        """
        reached = []
        for pair in self.pairs:
            if pair.source == group:
                self._stale(pair.copy, number)
            if pair.copy == group:
                reached.append(pair.source)
                self._stale(pair.source, number)
                for other in self.pairs:
                    beside = other.source == pair.source and other.copy != group
                    if beside and other.copy not in self.stale:  # else it is since before
                        like = pointwise and other.dense and pair.is_like(other.indices)
                        self._stale(other.copy, number + like)
        return reached

    def _stale(self, group: int, number: int) -> None:
        self.stale[group] = min(number, self.stale.get(group, number))

    def put_back(
        self, source: int, copy: int, indices: tuple[object, ...], put: Callable[[], object]
    ) -> None:
        """Run `put`, which performs `source[indices] = copy`.

        If it puts the copy back where it was taken, as `source[i] += 1` does, both agree afterwards
        whatever was written to the copy. One that was taken at another place of the kind stays as
        it is, as the view there does: `x[i] = x[j]`.
        """
        own = [pair for pair in self.pairs if pair.source == source and pair.copy == copy]
        kept = [pair for pair in own if pair.is_at(indices) or pair.is_like(indices)]
        self.pairs = [pair for pair in self.pairs if not any(pair is k for k in kept)]
        if any(pair.is_at(indices) for pair in kept):
            self.stale.pop(source, None)
        put()
        self.pairs += kept


def places(
    source: Tensor, indices: tuple[Any, ...], differs: Callable[[Tensor], bool]
) -> list[Place]:
    """The indices that differ by sample and have no dimensions.

    The list is empty if the indices cannot be followed.
    """
    found, dim, rest = [], 0, 0
    for item in indices:
        rest += _dims_of(item)
    for at, item in enumerate(indices):
        if (
            isinstance(item, Tensor)
            and item.dim() == 0
            and item.dtype in INTEGERS
            and differs(item)
        ):
            found.append(Place(at, dim, item))
        dim += source.dim() - rest if item is Ellipsis else _dims_of(item)
    return found if rest <= source.dim() else []


def _dims_of(item: Any) -> int:
    """Number of the source's dimensions that an index is for."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return 1


def taken(source: Tensor, indices: tuple[Any, ...], at: list[Place]) -> Tensor:
    """`source[indices]` as a copy."""
    left = list(indices)
    for place in at:
        # Not index_select: batched, it becomes a gather, which keeps its source for the backward,
        # and the source may be written to.
        before = (slice(None),) * place.dim
        source = source[(*before, place.index.reshape(1).long())]
        left[place.at] = 0
    return source[tuple(left)]


def put(source: Tensor, indices: tuple[Any, ...], at: list[Place], value: Any) -> None:
    """Write `source[indices] = value` by the numbers of the elements that the indices select."""
    numbers = torch.arange(source.numel(), device=source.device).view(source.shape)
    picked = taken(numbers, indices, at)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=source.dtype, device=source.device)
    value = value.to(source.dtype).to(source.device)
    while value.dim() > picked.dim() and value.shape[0] == 1:  # assignment ignores leading ones
        value = value[0]
    sizes = source.shape
    where = []
    for size in reversed(sizes):
        where.append(picked % size)
        picked = picked // size
    source.index_put_(tuple(reversed(where)), value)


def is_whole_or_apart(
    source: Tensor, indices: tuple[Any, ...], at: list[Place], value: Tensor
) -> bool:
    """True if `value`, of the memory of `source`, may be read before `source[indices]` is written.

    That is so if the two share all elements or none, wherever the indices that differ by sample
    point, as in `y[i] = y[2]`. If they share some, torch's answer depends on the order in which it
    reads and writes, or is an error, as in `y[i] = y[:, 0]`.
    """
    of_sample = {place.at for place in at}
    others = [item for k, item in enumerate(indices) if k not in of_sample]
    plain = all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in others)
    if not plain or value.dtype != source.dtype or not is_dense(source.shape, source.stride()):
        return False
    first, start = source.storage_offset(), value.storage_offset()
    if (
        start >= first + span(source.shape, source.stride())
        or start + span(value.shape, value.stride()) <= first
    ):
        return True
    numbers = list(indices)
    for place in at:
        numbers[place.at] = int(element(place.index))
    view = source[tuple(numbers)]
    while value.dim() > view.dim() and value.shape[0] == 1:
        value = value[0]
    if value.shape != view.shape or any(
        size > 1 and a != b
        for size, a, b in zip(view.shape, view.stride(), value.stride(), strict=True)
    ):
        return False
    here, there = (_coordinates(source, int(t.storage_offset())) for t in (view, value))
    if here is None or there is None:
        return False
    free = {place.dim for place in at}
    return all(a == b for k, (a, b) in enumerate(zip(here, there, strict=True)) if k not in free)


def _coordinates(dense: Tensor, offset: int) -> list[int] | None:
    """The indices of the element that lies at an offset; None if no element does."""
    found, rest = [0] * dense.dim(), offset - int(dense.storage_offset())
    for k in sorted(range(dense.dim()), key=dense.stride, reverse=True):
        if dense.shape[k] > 1:
            found[k], rest = divmod(rest, int(dense.stride(k)))
            if not 0 <= found[k] < dense.shape[k]:
                return None
    return found if rest == 0 else None


def one_hot(index: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """Serve `one_hot`; torch's own reads the smallest and largest index in python.

    The write checks the indices as well, for every sample.
    """
    if num_classes <= 0 or index.numel() == 0:
        return torch.nn.functional.one_hot(index, num_classes)
    out = torch.zeros((*index.shape, num_classes), dtype=torch.int64, device=index.device)
    return out.scatter_(-1, index.unsqueeze(-1), 1)


def tensor_split(*args: object, **kwargs: object) -> Sequence[Tensor]:
    """Serve `tensor_split`: torch reads the indices of a tensor from its memory, where nobody sees.

    Here each is asked for by `item()`, and is a question about a value.
    """
    split = cast(Callable[..., Sequence[Tensor]], torch.tensor_split)
    named: dict[str, object] = dict(zip(("input", _INDICES, "dim"), args, strict=False)) | kwargs
    at = named.pop(_INDICES, None)
    if not isinstance(at, Tensor) or at.dtype is not torch.int64 or at.dim() > 1 or not at.is_cpu:
        return split(*args, **kwargs)  # by numbers, or an error of torch's own
    named.setdefault("input", named.pop("self", None))
    numbers = [int(number.item()) for number in at.reshape(-1).unbind()]
    return split(**named, **({"indices": numbers} if at.dim() else {"sections": numbers[0]}))


_INDICES = "tensor_indices_or_sections"
_tensor_split = aten.tensor_split
BY_VALUES: dict[object, Callable[..., object]] = {
    torch.nn.functional.one_hot: one_hot,
    torch.tensor_split: tensor_split,
    Tensor.tensor_split: tensor_split,
    _tensor_split: tensor_split,
    _tensor_split.tensor_indices_or_sections: tensor_split,
}
"""Functions of torch that read values in C++ or python, and what serves them."""
