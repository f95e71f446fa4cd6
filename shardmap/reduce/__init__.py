"""Reductions, which combine the samples' results instead of stacking them (`reduce=`).

A reduction is given for each output of the mapped function, or for a whole subtree of them, as
`out_dims` is. Nothing is stacked: a chunk's results are combined as soon as they are computed, in
the order of the samples, so that memory does not grow with the batch and the numbers do not depend
on which device was faster.

`sum`, `mean`, `max`, `min` and `fold` treat each output by itself. `norm`, `clipped_sum`,
`second_moment`, `gram` and `project` are made for gradients: they take all outputs below their
place in the tree as one vector, a sample's gradient. For the weights of linear layers, convolutions
and embeddings that gradient is a product of activations and cotangents, and is not computed where
the products of the factors are cheaper (`plan.explain()` says where): "ghost" norms, after
Goodfellow 2015 (arXiv:1510.01799) and Li et al. 2022 (arXiv:2110.05679).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardmap import errors
from shardmap.reduce import per_sample as joint
from shardmap.reduce.reduction import Reduction


def sum() -> Reduction:
    """The sum over the samples, as `torch.stack(results).sum(0)`.

    Integers and bools are summed in int64.

    Half-precision results are summed in float32, and the sums of chunks in float64, before they are
    rounded to the result's dtype.

    Example:
        >>> import torch, shardmap
        >>> shardmap.vmap(torch.square, reduce=shardmap.reduce.sum())(torch.arange(4.))
        tensor(14.)
    """
    return Reduction("sum")


def mean() -> Reduction:
    """The mean over the samples, as `torch.stack(results).mean(0)`; for an empty batch it is NaN.

    Example:
        >>> import torch, shardmap
        >>> shardmap.vmap(torch.square, reduce="mean")(torch.arange(4.))
        tensor(3.5000)
    """
    return Reduction("mean")


def max() -> Reduction:
    """The largest value over the samples, entry by entry, as `torch.stack(results).amax(0)`.

    Gradients do not flow through it.

    Example:
        >>> import torch, shardmap
        >>> shardmap.vmap(torch.square, reduce="max")(torch.arange(4.))
        tensor(9.)
    """
    return Reduction("max")


def min() -> Reduction:
    """The smallest value over the samples, entry by entry, as `torch.stack(results).amin(0)`.

    Gradients do not flow through it.

    Example:
        >>> import torch, shardmap
        >>> shardmap.vmap(torch.square, reduce="min")(torch.arange(4.))
        tensor(0.)
    """
    return Reduction("min")


def fold(
    combine: Callable[[Tensor, Tensor], Tensor], finish: Callable[[Tensor], Tensor] | None = None
) -> Reduction:
    """A user-defined reduction; `reduce=(combine, finish)` means the same.

    Args:
        combine: Takes the results of two runs of neighbouring samples, each with the shape of one
            sample's result, and returns their combination, with the same shape. It must be
            associative, for samples are combined in pairs; their order is kept, so it need not be
            commutative. It is mapped over many pairs at once, and follows the rules of mapped
            functions.
        finish: Applied to the combination of all samples; by default nothing is.

    Example:
        >>> import torch, shardmap
        >>> rotations = torch.tensor([[0., -1.], [1., 0.]]).expand(5, 2, 2)
        >>> shardmap.vmap(lambda r: r.clone(), reduce=shardmap.reduce.fold(torch.matmul))(rotations)
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    return Reduction("fold", combine, finish)


def norm() -> joint.Joint:
    """The 2-norm of all of a sample's outputs together: `[N]`.

    For gradients it is the per-sample gradient norm.

    Example:
        >>> import torch, shardmap
        >>> rows = torch.tensor([[2., 1., 2.], [0., 3., 4.]])
        >>> shardmap.vmap(lambda x: {"a": x[:1], "b": x[1:]}, reduce="norm")(rows)
        tensor([3., 5.])
    """
    return joint.Norm()


def clipped_sum(max_norm: float, noise_multiplier: float = 0.0) -> joint.Joint:
    """Sum the outputs, each sample's scaled to a norm of at most `max_norm` (DP-SGD).

    Args:
        max_norm: C, the largest norm of all of a sample's outputs together.
        noise_multiplier: Noise of standard deviation `noise_multiplier * max_norm` is added to each
            entry of the sum, once, drawn from torch's generator: `torch.manual_seed` fixes it,
            whatever devices and chunks compute the sum.

    Returns:
        The structure of one sample's outputs. Divide by the batch size yourself; under Poisson
        sampling by the expected one.

    Raises:
        OptionError: A number is out of range.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy" (arXiv:1607.00133),
        algorithm 1.

    Example:
        >>> import torch, shardmap
        >>> rows = torch.tensor([[3., 4.], [0., 0.5]])
        >>> shardmap.vmap(lambda x: x.clone(), reduce=shardmap.reduce.clipped_sum(1.0))(rows)
        tensor([0.6000, 1.3000])
    """
    call = "shardmap.reduce.clipped_sum"
    return joint.ClippedSum(
        joint.number(max_norm, "max_norm", call, zero=False),
        joint.number(noise_multiplier, "noise_multiplier", call),
    )


def second_moment() -> joint.Joint:
    """The mean over the samples of the squares of each entry.

    For gradients it is the diagonal of the empirical Fisher matrix.

    Returns:
        The structure of one sample's outputs.

    Example:
        >>> import torch, shardmap
        >>> rows = torch.tensor([[1., 2.], [3., 0.]])
        >>> shardmap.vmap(lambda x: x.clone(), reduce=shardmap.reduce.second_moment())(rows)
        tensor([5., 2.])
    """
    return joint.SecondMoment()


def gram() -> joint.Joint:
    """The inner products of all pairs of samples, over all their outputs: `[N, N]`.

    For gradients it is the empirical NTK.

    It is computed in blocks, from the factors of the gradients where they are smaller than the
    gradients. The factors or gradients of all samples are kept in memory.

    Source: Jacot et al. 2018, "Neural Tangent Kernel" (arXiv:1806.07572).

    Example:
        >>> import torch, shardmap
        >>> rows = torch.tensor([[1., 2.], [3., 0.]])
        >>> shardmap.vmap(lambda x: x.clone(), reduce=shardmap.reduce.gram())(rows)
        tensor([[5., 3.],
                [3., 9.]])
    """
    return joint.Gram()


def project(dim: int, kind: str = "rademacher", seed: int = 0) -> joint.Joint:
    """A random projection of all of a sample's outputs to few dimensions: `[N, dim]`.

    It keeps inner products on average.

    The matrix has independent entries, divided by `sqrt(dim)`. It is never stored: blocks of it are
    drawn as they are needed, and the same seed draws the same matrix on every device and in every
    process, so that projections of different batches can be compared.

    Args:
        dim: k, the number of dimensions of the projection.
        kind: "rademacher", entries of +1 and -1, or "gaussian".
        seed: Seed of the matrix.

    Raises:
        OptionError: An argument is out of range.

    Source: Johnson and Lindenstrauss 1984; Achlioptas 2003 for signs; Park et al. 2023 (TRAK,
        arXiv:2303.14186) for gradients.

    Example:
        >>> import torch, shardmap
        >>> x = torch.randn(4, 1000)
        >>> projected = shardmap.vmap(lambda x: x.clone(), reduce=shardmap.reduce.project(512))(x)
        >>> projected.shape, bool((projected.norm(dim=1) / x.norm(dim=1) - 1).abs().max() < 0.2)
        (torch.Size([4, 512]), True)
    """
    call = "shardmap.reduce.project"
    for name, value in (("dim", dim), ("seed", seed)):
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < (name == "dim")
            or value >= 2**63
        ):
            raise errors.OptionError(
                f"{call}: {name}={value!r}; pass "
                f"{'a positive int' if name == 'dim' else 'an int of at least 0'}"
            )
    if kind not in ("rademacher", "gaussian"):
        raise errors.OptionError(f"{call}: kind={kind!r}; choose 'rademacher' or 'gaussian'")
    return joint.Project(dim, kind, seed)


def together(**parts: Any) -> joint.Joint:
    """Several reductions of the same outputs, in one pass over the samples.

    Args:
        **parts: Reductions by their names in the result: those of this module,
            or their names; None stacks.

    Returns:
        A dict of the results.

    Raises:
        OptionError: One of them is no reduction.

    Example:
        >>> import torch, shardmap
        >>> both = shardmap.reduce.together(mean="mean", norms="norm")
        >>> shardmap.vmap(lambda x: x.clone(), reduce=both)(torch.tensor([[3., 4.], [0., 0.]]))
        {'mean': tensor([1.5000, 2.0000]), 'norms': tensor([5., 0.])}
    """
    call = "shardmap.reduce.together"
    if not parts:
        raise errors.OptionError(
            f"{call}(): nothing to compute; name some, such as together(mean='mean', norms='norm')"
        )
    read = {name: joint.parse(part) for name, part in parts.items()}
    for name, part in read.items():
        if not isinstance(part, joint.Joint):
            parse(part, f"{call}({name}=...)")
    return joint.Together(tuple(read.items()))


_NAMED = {"sum": sum, "mean": mean, "max": max, "min": min}


def is_one(value: Any) -> bool:
    """True if `value` is a reduction itself, and not a structure that holds some."""
    pair = (
        isinstance(value, tuple)
        and len(value) == 2
        and callable(value[0])
        and (value[1] is None or callable(value[1]))
    )
    return value is None or isinstance(value, str | Reduction) or pair


def parse(value: Any, call: str) -> Reduction | None:
    """Parse a user's `value` into a reduction; None means stacking.

    Raises:
        OptionError: It names no reduction.
    """
    if value is None or isinstance(value, Reduction):
        return value
    if isinstance(value, tuple) and is_one(value):
        return fold(*value)
    if isinstance(value, str) and value in _NAMED:
        return _NAMED[value]()
    raise errors.OptionError(
        f"{call}: reduce={value!r} is no reduction; choose 'sum', 'mean', 'max', 'min', 'norm', "
        "'second_moment' or 'gram', a pair "
        "(combine, finish) of functions, one of shardmap.reduce, or None to stack"
    )


def refuse(
    reduction: Reduction, dtype: torch.dtype, samples: int, requires_grad: bool, call: str
) -> None:
    """Refuse what a reduction cannot do, before anything runs.

    Raises:
        OptionError: The dtype has no such reduction, or gradients from outside would have to flow
            through it.
        EmptyBatchError: There are no samples, and the reduction of nothing is not defined.
    """
    name = reduction.name
    if name == "mean" and not (dtype.is_floating_point or dtype.is_complex):
        raise errors.OptionError(
            f"{call}: reduce='mean' of an output of {dtype}; return floating-point numbers, or "
            "take the 'sum'"
        )
    if name in ("max", "min") and dtype.is_complex:
        raise errors.OptionError(
            f"{call}: reduce={name!r} of an output of {dtype}: complex numbers have no order; "
            "reduce their .abs()"
        )
    if name in ("max", "min") and requires_grad:
        raise errors.OptionError(
            f"{call}: reduce={name!r} of an output that requires grad: gradients do not flow "
            "through it; call it under torch.no_grad(), or "
            "stack the results and reduce them with torch"
        )
    if samples == 0 and name not in ("sum", "mean"):
        raise errors.EmptyBatchError(
            f"{call}: the batch is empty, and reduce={name!r} of no samples is not defined"
        )
