"""Rules of the matmul family.

They are matrix, vector and batched products, in every choice of mapped operands.

A product with an unmapped right operand is one product with the map folded into the rows: its
kernels are better than batched ones, and the operand is read once. Products of rows and columns
work on the vectors behind them (`shardmap.rules.view_folding`), so that the views that autograd
records around each product cost nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardmap._torch import aten
from shardmap.program.ir import Equation
from shardmap.rules import huge_pages as pages
from shardmap.rules import registry
from shardmap.rules.lowering import B, Lowering, V
from shardmap.rules.view_folding import views

_linear = torch.nn.functional.linear  # the builtin itself


def rules(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated `f(b, *args, **kwargs)` for `aten.<name>`.

    The arguments have the operators' own names and defaults.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def rule(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            return function(b, *args, **kwargs)

        registry.register("matmul", *registry.overloads(*names))(rule)
        return function

    return decorate


def _t(b: Lowering, x: V) -> V:
    """The transpose of a matrix."""
    if x.mapped:
        return views(b).rearrange(x, (1, 0))
    return b.call(aten.t.default, x, shape=x.shape[::-1])


def _flat(b: Lowering, x: V) -> V:
    """View a matrix with one row or one column as a vector."""
    return views(b).reshaped(x, (x.numel,)) if x.mapped else b.view(x, (x.numel,))


def _column(b: Lowering, x: V) -> V:
    """View a mapped vector as a matrix with one column."""
    return views(b).rearrange(x, (0, None))


def _row(b: Lowering, x: V) -> V:
    """View a mapped vector as a matrix with one row."""
    return views(b).rearrange(x, (None, 0))


def _bmm(b: Lowering, m: int, n: int) -> Any:
    return pages.bmm if pages.large(b, m, n) else aten.bmm.default


def _stacked(b: Lowering, x: V) -> V:
    """A matrix for each sample, mapped or not: `[B, m, n]` for a batched product."""
    return (
        x if x.mapped else b.call(torch.Tensor.expand, x, B, *x.shape, shape=x.shape, mapped=True)
    )


# -- a matrix times a matrix


@rules("mm")
def mm(b: Lowering, x: V, y: V) -> V:
    """Batch `[m, k] @ [k, n]`."""
    (m, k), n = x.shape, y.shape[1]
    if not y.mapped:
        if m == 1:
            return _row(b, b.call(aten.mm.default, _flat(b, x), y, shape=(n,)))
        # [B, ..., k] @ [k, n]: torch.matmul folds all but the last dimension into rows
        whole = views(b).in_order(x)
        if whole.ndim < 2 or whole.shape[-1] != k:
            whole = x
        out = b.call(torch.matmul, whole, y, shape=(*whole.shape[:-1], n))
        return views(b).reshaped(out, (m, n))
    if not x.mapped:
        if n == 1:
            return _column(b, b.call(aten.mm.default, _flat(b, y), _t(b, x), shape=(m,)))
        return b.call(_bmm(b, m, n), _stacked(b, x), y, shape=(m, n))
    if k == 1 and x.dtype != torch.bool:
        return views(b).outer(_flat(b, x), _flat(b, y))
    return b.call(_bmm(b, m, n), x, y, shape=(m, n))


@rules("addmm")
def addmm(b: Lowering, bias: V, x: V, y: V, *, beta: Any = 1, alpha: Any = 1) -> V:
    """Batch `beta * bias + alpha * x @ y`; a zero `beta` drops even a NaN."""
    (m, k), n = x.shape, y.shape[1]
    weights = {"beta": beta, "alpha": alpha}
    if not y.mapped and x.mapped:
        per_column = not bias.mapped and all(s == 1 for s in bias.shape[:-1])
        if m == 1 and (bias.mapped or per_column):
            return _row(
                b,
                b.call(
                    aten.addmm.default, _bias_row(b, bias), _flat(b, x), y, shape=(n,), **weights
                ),
            )
        if (
            per_column
            and bias.shape == (n,)
            and beta == 1
            and alpha == 1
            and x.dtype.is_floating_point
        ):
            whole = views(b).in_order(x)
            if whole.ndim < 2 or whole.shape[-1] != k:
                whole = x
            out = b.call(_linear, whole, _t(b, y), bias, shape=(*whole.shape[:-1], n))
            return views(b).reshaped(out, (m, n))
    return b.call(
        aten.baddbmm.default,
        _broad(b, bias, 2),
        _stacked(b, x),
        _stacked(b, y),
        shape=(m, n),
        **weights,
    )


def _bias_row(b: Lowering, bias: V) -> V:
    """The bias for a sum with `[B, n]`: `[B, n]`, `[B, 1]` or an unmapped vector."""
    if not bias.mapped:
        return bias if bias.ndim < 2 else b.view(bias, bias.shape[-1:])
    return views(b).reshaped(bias, bias.shape[-1:] or (1,))


def _broad(b: Lowering, bias: V, ndim: int) -> V:
    """The bias for a sum with `[B, ...]` with `ndim` sample dimensions."""
    if not bias.mapped:
        return bias
    return views(b).rearrange(bias, (*[None] * (ndim - bias.ndim), *range(bias.ndim)))


# -- batched products


@rules("bmm")
def bmm(b: Lowering, x: V, y: V) -> V:
    """Batch `[b, m, k] @ [b, k, n]`."""
    (size, m, k), n = x.shape, y.shape[2]
    if x.mapped and y.mapped:
        wide_x, wide_y = views(b).in_order(x), views(b).in_order(y)
        lead = wide_x.shape[:-2]
        if (
            len(lead)
            and lead == wide_y.shape[:-2]
            and (wide_x.shape[-2:], wide_y.shape[-2:]) == ((m, k), (k, n))
        ):
            out = b.call(torch.matmul, wide_x, wide_y, shape=(*lead, m, n))
            return views(b).reshaped(out, (size, m, n))
        return b.call(torch.matmul, x, y, shape=(size, m, n))
    # One operand for all samples: the map goes into the other's rows (or columns), so that nothing
    # is copied for each sample.
    if not y.mapped:
        return b.call(_shared_right, x, y, shape=(size, m, n))
    return b.call(_shared_left, x, y, shape=(size, m, n))


def _shared_right(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Multiply `[B, b, m, k] @ [b, k, n]`, contiguous."""
    count, size, m, k = x.shape
    rows = x.transpose(0, 1).reshape(size, count * m, k)
    return torch.bmm(rows, y).view(size, count, m, y.shape[2]).transpose(0, 1).contiguous()


def _shared_left(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Multiply `[b, m, k] @ [B, b, k, n]`, contiguous."""
    count, size, k, n = y.shape
    columns = y.permute(1, 2, 0, 3).reshape(size, k, count * n)
    return torch.bmm(x, columns).view(size, x.shape[1], count, n).permute(2, 0, 1, 3).contiguous()


@rules("baddbmm")
def baddbmm(b: Lowering, bias: V, x: V, y: V, *, beta: Any = 1, alpha: Any = 1) -> V:
    """Batch `beta * bias + alpha * x @ y` with a leading dimension of the sample's own."""
    (size, m, k), n = x.shape, y.shape[2]

    def baddbmm_flat(bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        added = bias.expand(count, size, m, n).reshape(count * size, m, n)
        left, right = x.reshape(count * size, m, k), y.reshape(count * size, k, n)
        return torch.baddbmm(added, left, right, beta=beta, alpha=alpha).view(count, size, m, n)

    return b.call(
        baddbmm_flat,
        _broad(b, bias, 3),
        _stacked(b, x),
        _stacked(b, y),
        shape=(size, m, n),
        dtype=x.dtype,
    )


@rules("addbmm")
def addbmm(b: Lowering, bias: V, x: V, y: V, *, beta: Any = 1, alpha: Any = 1) -> V:
    """Batch the sum over a batch of products as one product: `[m, b*k] @ [b*k, n]`."""
    (size, m, k), n = x.shape, y.shape[2]
    shift = int(x.mapped)
    wide = b.call(aten.permute.default, x, [0, 2, 1, 3] if shift else [1, 0, 2], shape=(m, size, k))
    return addmm(
        b, bias, b.reshape(wide, (m, size * k)), b.reshape(y, (size * k, n)), beta=beta, alpha=alpha
    )


# -- vectors


@rules("mv")
def mv(b: Lowering, x: V, y: V) -> V:
    """Batch `[m, k] @ [k]`."""
    if not y.mapped:
        return b.call(torch.matmul, x, y, shape=x.shape[:1])
    if not x.mapped:
        return b.call(aten.mm.default, y, _t(b, x), shape=x.shape[:1])
    return _flat(b, b.call(aten.bmm.default, x, _column(b, y), shape=(x.shape[0], 1)))


@rules("dot")
def dot(b: Lowering, x: V, y: V) -> V:
    """Batch `[k] @ [k]`."""
    if x.mapped and y.mapped:
        out = b.call(aten.bmm.default, _row(b, x), _column(b, y), shape=(1, 1))
        return views(b).reshaped(out, ())
    mapped, shared = (x, y) if x.mapped else (y, x)
    return b.call(aten.mv.default, mapped, shared, shape=())


@rules("vdot")
def vdot(b: Lowering, x: V, y: V) -> V:
    """Batch `conj([k]) @ [k]`."""
    return dot(b, b.call(torch.conj, x, shape=x.shape) if x.dtype.is_complex else x, y)


@rules("addmv")
def addmv(b: Lowering, bias: V, x: V, y: V, *, beta: Any = 1, alpha: Any = 1) -> V:
    """Batch `beta * bias + alpha * x @ y` for a matrix and a vector."""
    if not x.mapped and y.mapped:
        added = bias if not bias.mapped else _bias_row(b, bias)
        return b.call(
            aten.addmm.default, added, y, _t(b, x), shape=x.shape[:1], beta=beta, alpha=alpha
        )
    column = _column(b, y) if y.mapped else b.view(y, (y.numel, 1))
    if bias.ndim:
        added = _column(b, bias) if bias.mapped else b.view(bias, (*bias.shape, 1))
    else:
        added = _broad(b, bias, 2)
    return _flat(b, addmm(b, added, x, column, beta=beta, alpha=alpha))


@rules("addr")
def addr(b: Lowering, bias: V, x: V, y: V, *, beta: Any = 1, alpha: Any = 1) -> V:
    """Batch `beta * bias + alpha * x y^T`."""
    if x.dtype == torch.bool or x.dtype != y.dtype or bias.dtype != x.dtype:
        return NotImplemented
    column = _column(b, x) if x.mapped else b.view(x, (x.numel, 1))
    row = _row(b, y) if y.mapped else b.view(y, (1, y.numel))
    return addmm(b, bias, column, row, beta=beta, alpha=alpha)


@rules("_int_mm")
def int_mm(b: Lowering, x: V, y: V) -> Any:
    """Batch products of bytes summed as 32-bit integers."""
    (m, k), n = x.shape, y.shape[1]
    if not y.mapped:
        rows = b.call(torch.Tensor.reshape, x, [-1, k])
        out = b.call(aten._int_mm.default, rows, y, dtype=torch.int32)
        return b.call(torch.Tensor.view, out, [-1, m, n], shape=(m, n), dtype=torch.int32)
    if b.device_type != "cpu":
        return NotImplemented  # no other device has batched products of integers
    wide = [_stacked(b, b.cast(v, torch.int32)) for v in (x, y)]
    return b.call(aten.bmm.default, *wide, shape=(m, n), dtype=torch.int32)


# -- products of three


@rules("_trilinear")
def trilinear(
    b: Lowering,
    x: V,
    y: V,
    z: V,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> V:
    """Batch the product of three operands summed over some dimensions, as `F.bilinear` calls it.

    Each operand lacks the dimensions in its `expand`.
    """
    lacking = expand1, expand2, expand3
    ndim = x.ndim + len(expand1)
    letters = "abcdefghijklmnopqrstuvwxy"[:ndim]
    sizes = dict.fromkeys(letters, 1)
    names = []
    for v, missing in zip((x, y, z), lacking, strict=True):
        own = [letter for d, letter in enumerate(letters) if d not in missing]
        for letter, size in zip(own, v.shape, strict=True):
            sizes[letter] = size if sizes[letter] == 1 else sizes[letter]
        names.append("".join(own))
    kept = "".join(letter for d, letter in enumerate(letters) if d not in sumdim)
    terms = [("z" if v.mapped else "") + n for v, n in zip((x, y, z), names, strict=True)]
    # The operands are multiplied in order, so that two meet which share what is summed.
    form = f"{','.join(terms)}->z{kept}"
    return b.call(torch.einsum, form, x, y, z, shape=tuple([sizes[k] for k in kept]), mapped=True)
