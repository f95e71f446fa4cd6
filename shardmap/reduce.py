"""What becomes of the samples' results where they are not stacked: `shardmap.vmap(fn, reduce=...)`.

A reduction is given for each output of the mapped function, or for a whole subtree of them, as `out_dims` is. Nothing is stacked: a chunk's
results are combined as soon as they are computed, in the order of the samples, so that memory does not grow with the batch and the
numbers do not depend on which device was faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardmap import errors


@dataclass(frozen=True, slots=True)
class Reduction:
    """One way to combine results of samples."""

    name: str
    combine: Callable[[Tensor, Tensor], Tensor] | None = None
    """Of a reduction of the user's own."""
    finish: Callable[[Tensor], Tensor] | None = None


def sum() -> Reduction:
    """The sum over the samples, as `torch.stack(results).sum(0)`: integers and bools are summed in int64.

    Half-precision results are summed in float32, and the sums of chunks in float64, before they are rounded to the result's dtype.

    Example:
        >>> import torch, shardmap
        >>> shardmap.vmap(torch.square, reduce=shardmap.reduce.sum())(torch.arange(4.))
        tensor(14.)
    """
    return Reduction("sum")


def mean() -> Reduction:
    """The mean over the samples, as `torch.stack(results).mean(0)`; of no samples it is NaN.

    Example:
        >>> import torch, shardmap
        >>> shardmap.vmap(torch.square, reduce="mean")(torch.arange(4.))
        tensor(3.5000)
    """
    return Reduction("mean")


def max() -> Reduction:
    """The largest value over the samples, entry by entry, as `torch.stack(results).amax(0)`. Gradients do not flow through it.

    Example:
        >>> import torch, shardmap
        >>> shardmap.vmap(torch.square, reduce="max")(torch.arange(4.))
        tensor(9.)
    """
    return Reduction("max")


def min() -> Reduction:
    """The smallest value over the samples, entry by entry, as `torch.stack(results).amin(0)`. Gradients do not flow through it.

    Example:
        >>> import torch, shardmap
        >>> shardmap.vmap(torch.square, reduce="min")(torch.arange(4.))
        tensor(0.)
    """
    return Reduction("min")


def fold(combine: Callable[[Tensor, Tensor], Tensor], finish: Callable[[Tensor], Tensor] | None = None) -> Reduction:
    """A reduction of one's own; `reduce=(combine, finish)` says the same.

    Args:
        combine: Takes the results of two runs of neighbouring samples, each with the shape of one sample's result, and returns their
            combination, with the same shape. It must be associative, for samples are combined in pairs; their order is kept, so it need
            not be commutative. It is mapped over many pairs at once, and follows the rules of mapped functions.
        finish: Applied to the combination of all samples; by default nothing is.

    Example:
        >>> import torch, shardmap
        >>> rotations = torch.tensor([[0., -1.], [1., 0.]]).expand(5, 2, 2)
        >>> shardmap.vmap(lambda r: r.clone(), reduce=shardmap.reduce.fold(torch.matmul))(rotations)
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    return Reduction("fold", combine, finish)


_NAMED = {"sum": sum, "mean": mean, "max": max, "min": min}


def is_one(value: Any) -> bool:
    """Whether `value` is a reduction itself, and not a structure that holds some."""
    pair = isinstance(value, tuple) and len(value) == 2 and callable(value[0]) and (value[1] is None or callable(value[1]))
    return value is None or isinstance(value, str | Reduction) or pair


def parse(value: Any, call: str) -> Reduction | None:
    """The reduction that a user's `value` names; None stacks.

    Raises:
        OptionError: It names none.
    """
    if value is None or isinstance(value, Reduction):
        return value
    if isinstance(value, tuple) and is_one(value):
        return fold(*value)
    if isinstance(value, str) and value in _NAMED:
        return _NAMED[value]()
    raise errors.OptionError(
        f"{call}: reduce={value!r} is no reduction; choose 'sum', 'mean', 'max' or 'min', a pair (combine, finish) of functions, one of "
        "shardmap.reduce, or None to stack"
    )


def refuse(reduction: Reduction, dtype: torch.dtype, samples: int, requires_grad: bool, call: str) -> None:
    """Refuse what a reduction cannot do, before anything runs.

    Raises:
        OptionError: The dtype has no such reduction, or gradients from outside would have to flow through it.
        EmptyBatchError: There are no samples, and the reduction of nothing is not defined.
    """
    name = reduction.name
    if name == "mean" and not (dtype.is_floating_point or dtype.is_complex):
        raise errors.OptionError(f"{call}: reduce='mean' of an output of {dtype}; return floating-point numbers, or take the 'sum'")
    if name in ("max", "min") and dtype.is_complex:
        raise errors.OptionError(f"{call}: reduce={name!r} of an output of {dtype}: complex numbers have no order; reduce their .abs()")
    if name in ("max", "min") and requires_grad:
        raise errors.OptionError(
            f"{call}: reduce={name!r} of an output that requires grad: gradients do not flow through it; call it under torch.no_grad(), or "
            "stack the results and reduce them with torch"
        )
    if samples == 0 and name not in ("sum", "mean"):
        raise errors.EmptyBatchError(f"{call}: the batch is empty, and reduce={name!r} of no samples is not defined")
