"""Random projections.

The matrix is drawn block by block from a counter-based generator, and never stored.

Row r of the matrix belongs to entry r of a sample's outputs, so that the result does not depend on
how these are cut. Where the outputs are products, rows of the products are computed from the
factors as they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardmap._torch import aten
from shardmap.factors.find import Patches, Rows
from shardmap.factors.norms import factors_of
from shardmap.factors.scales import scale_of
from shardmap.program.ir import Equation, Var
from shardmap.rules.lowering import Lowering, V
from shardmap.rules.philox import Stream
from shardmap.rules.registry import register

if TYPE_CHECKING:
    from shardmap.factors.builder import FactorBuilder


BLOCK_ENTRIES = 1 << 20
"""Number of the matrix's entries that are in memory at a time."""
_STREAM = 0x70726F6A
"""Number of the generator's stream: the matrix of a seed is independent of the draws of mapped
functions with the same seed."""


@torch.library.custom_op("shardmap::project", mutates_args=())
def _project(t: Tensor, dim: int, kind: str, seed: int, offset: int) -> Tensor:
    return projected(t.unsqueeze(0), dim, kind, seed, offset).squeeze(0)


@_project.register_fake
def _(t: Tensor, dim: int, kind: str, seed: int, offset: int) -> Tensor:
    return t.new_empty((dim,))


OPERATOR = torch.ops.shardmap.project.default


def project(t: Tensor, dim: int, kind: str, seed: int, offset: int) -> Tensor:
    """Multiply a random matrix by one sample's tensor, flattened: `[dim]`.

    Args:
        t: Tensor of any shape.
        dim: Rows of the result.
        kind: "rademacher" or "gaussian".
        seed: Seed of the matrix.
        offset: Number of the matrix's rows that belong to tensors before this one.
    """
    return torch.ops.shardmap.project(t, dim, kind, seed, offset)


@register("project", OPERATOR)
def rule(b: Lowering, eq: Equation, args: Any, kwargs: Any) -> V:
    """Multiply each block of the matrix by all samples at once."""
    t, *rest = args
    return b.call(projected, t, *rest, shape=eq.outs[0].spec.shape)


def from_factors(builder: FactorBuilder, eq: Equation) -> V | None:
    """The projection of a product, without all of the product.

    None if the call is no such projection.
    """
    if eq.op is not OPERATOR:
        return None
    var, dim, kind, seed, offset = eq.args
    return _of(builder, eq, var, (dim, kind, seed), offset)


def _of(
    builder: FactorBuilder, eq: Equation, var: Var, which: tuple[int, str, int], offset: int
) -> V | None:
    """The projection of a value; for concatenated parts the sum over them."""
    inner = builder.factors.same(var)
    maker = builder.factors.maker(inner)
    if (
        maker is not None
        and maker.op is aten.cat.default
        and len(inner.spec.shape) == 1
        and inner.group not in builder.factors.written
    ):
        return _of_parts(builder, eq, maker.args[0], which, offset)
    found = builder.factors.of(var)
    if (
        found is None
        or len(found.terms) != 1
        or type(found.terms[0]) is Rows
        or builder.wanted(var)
    ):
        return None
    term = found.terms[0]
    if (type(term) is Patches and not term.plain) or term.positions * (
        term.n + term.m
    ) > term.n * term.m:
        return None
    builder.note(eq, f"projected from factors [{term.n}, T] x [T, {term.m}], T = {term.positions}")
    left, right = factors_of(builder, term)
    out = builder.b.call(
        projected_product,
        left,
        right,
        *which,
        offset,
        term.flipped,
        shape=which[:1],
        dtype=right.dtype,
    )
    scale = scale_of(builder, term)
    return out if scale is None else builder.b.call(scaled, out, scale, shape=out.shape)


def _of_parts(
    builder: FactorBuilder,
    eq: Equation,
    parts: Sequence[Var],
    which: tuple[int, str, int],
    offset: int,
) -> V | None:
    found, any_factors = [], False
    for part in parts:
        out = _of(builder, eq, part, which, offset)
        any_factors = any_factors or out is not None
        found.append(
            builder.b.call(projected, builder.batched(part), *which, offset, shape=which[:1])
            if out is None
            else out
        )
        offset += math.prod(part.spec.shape)
    if not any_factors:
        return None
    total = found[0]
    for out in found[1:]:
        total = builder.b.call(aten.add.Tensor, total, out, shape=which[:1])
    return total


# -- on whole batches


def rows_of_matrix(start: int, count: int, dim: int, kind: str, seed: int, like: Tensor) -> Tensor:
    """Rows `start` to `start + count` of the random matrix, `[count, dim]`, not divided yet."""
    stream = Stream(count, start, seed, _STREAM)
    drawn = stream.signs(dim) if kind == "rademacher" else stream.normal(dim)
    return torch.from_numpy(drawn).to(like.dtype).to(like.device)


def projected(t: Tensor, dim: int, kind: str, seed: int, offset: int) -> Tensor:
    """Projection of a batch: `[B, ...] -> [B, dim]`."""
    flat = t.reshape(t.shape[0], math.prod(t.shape[1:]))
    step = max(1, BLOCK_ENTRIES // dim)
    total = t.new_zeros((len(flat), dim))
    for start in range(0, flat.shape[1], step):
        part = flat[:, start : start + step]
        total.addmm_(part, rows_of_matrix(offset + start, part.shape[1], dim, kind, seed, t))
    return total.div_(math.sqrt(dim))


def projected_product(
    left: Tensor, right: Tensor, dim: int, kind: str, seed: int, offset: int, flipped: bool
) -> Tensor:
    """Projection of the product of two factors, some rows of it at a time.

    `[B, n, T], [B, T, m] -> [B, dim]`.
    """
    if flipped:
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    count, n, m = left.shape[0], left.shape[1], right.shape[2]
    step = max(1, BLOCK_ENTRIES // (dim * m))
    total = right.new_zeros((count, dim))
    for start in range(0, n, step):
        part = torch.bmm(left[:, start : start + step], right).flatten(1)
        total.addmm_(
            part, rows_of_matrix(offset + start * m, part.shape[1], dim, kind, seed, right)
        )
    return total.div_(math.sqrt(dim))


def scaled(t: Tensor, scale: Tensor) -> Tensor:
    """Multiply `[B, dim]` by a number for each sample, or for all."""
    return t * (scale.unsqueeze(1) if scale.dim() else scale)
