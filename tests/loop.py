"""The plain loop over the rows of a batch, with the signature of `shardmap.vmap`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree


def flatten_dims(dims: Any, tree: Any) -> list[int | None]:
    """Repeats the prefix tree `dims` over the leaves of `tree`."""
    leaves, spec = pytree.tree_flatten(tree)
    if dims is None or isinstance(dims, int):
        return [dims] * len(leaves)
    if isinstance(dims, list):
        dims = tuple(dims)
    flat = pytree._broadcast_to_and_flatten(dims, spec, is_leaf=lambda d: d is None)
    assert flat is not None, f"in_dims {dims} do not fit {spec}"
    return flat


def rows(args: tuple[Any, ...], in_dims: Any) -> tuple[int, Callable[[int], tuple[Any, ...]]]:
    """The batch size, and a function that takes row `i` of every mapped argument as a view."""
    leaves, spec = pytree.tree_flatten(args)
    dims = flatten_dims(in_dims, args)
    sizes = {
        leaf.shape[d]
        for leaf, d in zip(leaves, dims, strict=True)
        if d is not None and isinstance(leaf, torch.Tensor)
    }
    assert len(sizes) == 1, f"batch sizes {sizes}"

    def row(i: int) -> tuple[Any, ...]:
        picked = [
            leaf.select(d, i) if d is not None and isinstance(leaf, torch.Tensor) else leaf
            for leaf, d in zip(leaves, dims, strict=True)
        ]
        return pytree.tree_unflatten(picked, spec)

    return sizes.pop(), row


def loop(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    kw_in_dims: Any = None,
    **options: Any,
) -> Callable[..., Any]:
    """The specification: `func` on every row, results stacked.

    Options that only say how to compute are ignored.

    Of an empty batch the loop has no row to learn shapes from: it runs `func` on zeros (the sum of
    no rows, so that gradients reach the batch) and keeps the shapes.
    """
    del randomness, options

    def mapped(*args: Any, **kwargs: Any) -> Any:
        named = kw_in_dims or {}
        dims = (
            tuple(flatten_dims(in_dims, args)),
            tuple(flatten_dims(dict.fromkeys(kwargs) | dict(named), kwargs)),
        )
        flat, spec = pytree.tree_flatten((args, kwargs))
        size, row = rows(tuple(flat), dims[0] + dims[1])
        if size == 0:
            picked = [
                leaf.movedim(d, 0).sum(0).to(leaf.dtype)
                if d is not None and isinstance(leaf, torch.Tensor)
                else leaf
                for leaf, d in zip(flat, dims[0] + dims[1], strict=True)
            ]
            results = [pytree.tree_flatten(_call(func, spec, picked))]
        else:
            results = [pytree.tree_flatten(_call(func, spec, row(i))) for i in range(size)]
        out_spec = results[0][1]
        columns = list(zip(*(leaves for leaves, _ in results), strict=True))
        out_flat = flatten_dims(out_dims, pytree.tree_unflatten(list(results[0][0]), out_spec))
        stacked = [torch.stack(column, d or 0) for column, d in zip(columns, out_flat, strict=True)]
        if size == 0:
            stacked = [
                leaf.narrow(d or 0, 0, 0).clone() for leaf, d in zip(stacked, out_flat, strict=True)
            ]
        return pytree.tree_unflatten(stacked, out_spec)

    return mapped


def _call(func: Callable[..., Any], spec: Any, leaves: Sequence[Any]) -> Any:
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    return func(*args, **kwargs)
