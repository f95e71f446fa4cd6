"""Sums of squares of products, from the factors.

`|A B|^2 = <A^T A, B B^T>`: two `[T, T]` matrices instead of one of `[n, m]`; over one position the
product of two norms. Several terms, the uses of a shared weight, are one product over all their
positions. (Goodfellow 2015, arXiv:1510.01799; for positions Li et al. 2022, arXiv:2110.05679; for
convolutions Bu et al. 2022, arXiv:2205.10683.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardmap._torch import aten
from shardmap.factors.find import Factored, Patches, Product, Rows, Term, sizes
from shardmap.factors.scales import scale_of
from shardmap.program.ir import Equation, Var
from shardmap.rules.lowering import V

if TYPE_CHECKING:
    from shardmap.factors.builder import FactorBuilder


PASS = 30
"""Cost of writing an element and reading it again, in operations of a product: an estimate (12
bytes at 10 GB/s against 25 GFLOP/s)."""


def square(eq: Equation | None) -> Var | None:
    """The value that a call squares entry by entry, or None."""
    if eq is None:
        return None
    if eq.op is aten.pow.Tensor_Scalar and type(eq.args[1]) in (int, float) and eq.args[1] == 2:
        return eq.args[0]
    if eq.op is aten.square.default or (eq.op is aten.mul.Tensor and eq.args[0] == eq.args[1]):
        return eq.args[0]
    return None


def summed_square(eq: Equation, builder: FactorBuilder) -> Var | None:
    """The value whose squares a call sums up, or None."""
    named, args = dict(eq.kwargs), list(eq.args)
    if named.get("dtype") is not None:
        return None
    whole = eq.op is aten.sum.dim_IntList and not (len(args) > 2 and args[2]) and not _shape(eq)
    if eq.op is not aten.sum.default and not whole:
        return None
    inner = args[0]
    if inner.group in builder.factors.written:
        return None
    return square(builder.factors.maker(builder.factors.same(inner)))


def _shape(eq: Equation) -> tuple[int, ...]:
    """Shape of the call's only result."""
    (out,) = eq.results()
    return tuple(out.spec.shape)


def norm(builder: FactorBuilder, eq: Equation) -> V | None:
    """A sum of squares, or a 2-norm, computed from factors.

    None if there are no factors, or the plain computation is cheaper.
    """
    target = summed_square(eq, builder)
    root = False
    if (
        target is None
        and eq.op is aten.linalg_vector_norm.default
        and not _shape(eq)
        and not eq.kwargs
    ):
        args = list(eq.args)
        order = args[1] if len(args) > 1 else 2
        target, root = (
            (args[0], True) if type(order) in (int, float) and order == 2 else (None, False)
        )
    if target is None or not list(eq.results()):
        return None
    out = _of(builder, target, eq)
    if out is None:
        return None
    return builder.b.call(torch.sqrt, out, shape=()) if root else out


def _of(builder: FactorBuilder, var: Var, eq: Equation) -> V | None:
    """`[B]`, the sum of the squares of a value; for concatenated parts the sum over them."""
    inner = builder.factors.same(var)
    maker = builder.factors.maker(inner)
    if (
        maker is not None
        and maker.op is aten.cat.default
        and inner.group not in builder.factors.written
    ):
        parts = [(_of(builder, part, eq), part) for part in maker.args[0]]
        if all(found is None for found, _ in parts):
            return None
        totals = [_plain(builder, part) if found is None else found for found, part in parts]
        out = totals[0]
        for t in totals[1:]:
            out = builder.b.call(aten.add.Tensor, out, t, shape=())
        return out
    found = builder.factors.of(var)
    if found is None:
        return None
    if not worthwhile(found, builder.wanted(var)):
        builder.kept.append(found)  # the plain norm reads the product
        return None
    builder.note(eq, f"norm from factors {sizes(found.terms)}")
    return _combined(builder, found)


def _plain(builder: FactorBuilder, var: Var) -> V:
    v = builder.value(var)
    over = list(range(int(v.mapped), v.ndim + int(v.mapped)))
    squares = builder.b.call(aten.square.default, v, shape=v.shape)
    return builder.b.call(aten.sum.dim_IntList, squares, over, shape=()) if over else squares


def worthwhile(found: Factored, wanted: bool) -> bool:
    """True if the norm from factors is cheaper.

    Args:
        found: The factors.
        wanted: True if the product itself is computed in any case.
    """
    term = found.terms[0]
    positions = sum(t.positions for t in found.terms)
    if any(type(t) is Patches and not t.plain for t in found.terms):
        return False
    plain = (0 if wanted else sum(t.cost for t in found.terms)) + PASS * term.n * term.m
    width = sum(t.m if type(t) is Rows else t.n + t.m for t in found.terms) // len(found.terms)
    factored = (
        2 * positions**2 * width + PASS * positions**2
        if positions > 1
        else PASS * (term.n + term.m)
    )
    if any(type(t) is Patches for t in found.terms):
        factored += PASS * term.m * positions  # the concatenated patches
    return factored < plain


def _combined(builder: FactorBuilder, found: Factored) -> V:
    terms = found.terms
    if len(terms) > 1 and all(type(t) is Product for t in terms):
        return _of_one_product(builder, found)
    total: V | None = None
    for i, a in enumerate(terms):
        for j in range(i + 1):
            part = inner(builder, a, terms[j])
            for number in (scale_of(builder, a), scale_of(builder, terms[j])):
                if number is not None:
                    part = builder.b.call(aten.mul.Tensor, part, number, shape=())
            if i != j:
                part = builder.b.call(aten.mul.Tensor, part, 2, shape=())
            total = (
                part if total is None else builder.b.call(aten.add.Tensor, total, part, shape=())
            )
    assert total is not None
    return (
        builder.b.call(torch.clamp_min, total, 0, shape=())
        if any(t.positions > 1 for t in terms)
        else total
    )


def _of_one_product(builder: FactorBuilder, found: Factored) -> V:
    """The norm of several uses of a weight, as one product over all their positions."""
    positions = sum(t.positions for t in found.terms)
    n, m = found.terms[0].n, found.terms[0].m
    rights = []
    for t in found.terms:
        right, number = builder.batched(t.right), scale_of(builder, t)
        rights.append(
            right if number is None else builder.b.call(weighted, right, number, shape=right.shape)
        )
    left = builder.b.call(
        torch.cat, [builder.batched(t.left) for t in found.terms], 2, shape=(n, positions)
    )
    right = builder.b.call(torch.cat, rights, 1, shape=(positions, m))
    lefts = builder.b.call(columns, left, left, shape=(positions, positions))
    out = builder.b.call(
        inner_of,
        lefts,
        builder.b.call(rows_of, right, right, shape=(positions, positions)),
        shape=(),
    )
    return builder.b.call(torch.clamp_min, out, 0, shape=())


def inner(builder: FactorBuilder, a: Term, b: Term) -> V:
    """`[B]`, the inner product of two terms for each sample, without their scales."""
    call = builder.b.call
    dtype = a.right.spec.dtype
    if a is b and a.positions == 1 and type(a) is not Rows:
        left, right = builder.batched(a.left), builder.batched(a.right)
        return call(
            aten.mul.Tensor, _energy(builder, left), _energy(builder, right), shape=(), dtype=dtype
        )
    if type(a) is Rows and type(b) is Rows:
        return call(
            rows_rows,
            builder.batched(a.left),
            builder.batched(a.right),
            builder.batched(b.left),
            builder.batched(b.right),
            a.padding,
            b.padding,
            shape=(),
            dtype=dtype,
        )
    if type(a) is Rows or type(b) is Rows:
        rows, product = (a, b) if type(a) is Rows else (b, a)
        assert type(rows) is Rows
        left, right = factors_of(builder, product)
        return call(
            rows_product,
            builder.batched(rows.left),
            builder.batched(rows.right),
            left,
            right,
            rows.padding,
            product.flipped,
            shape=(),
            dtype=dtype,
        )
    (left, right), (other_left, other_right) = factors_of(builder, a), factors_of(builder, b)
    lefts = builder.once("columns", columns, left, other_left, shape=(a.positions, b.positions))
    rights = builder.once("rows", rows_of, right, other_right, shape=(a.positions, b.positions))
    return call(inner_of, lefts, rights, shape=(), dtype=dtype)


def _energy(builder: FactorBuilder, v: V) -> V:
    return builder.once("energy", energy, v, shape=())


def factors_of(builder: FactorBuilder, term: Term) -> tuple[V, V]:
    """The factors of a term: `[B, n, T]` and `[B, T, m]`."""
    left, right = builder.batched(term.left), builder.batched(term.right)
    if type(term) is Product:
        return left, right
    assert type(term) is Patches
    left = builder.once("channels", channels, left, shape=(term.n, term.positions))
    return left, builder.once(
        "patches",
        patches,
        right,
        term.weight[2:],
        *term.numbers[:3],
        shape=(term.positions, term.m),
    )


# -- on whole batches


def weighted(t: Tensor, weight: Tensor | None) -> Tensor:
    """Multiply `[B, ...]` by a number for each sample, `[B]`, or for all."""
    if weight is None:
        return t
    return t * (weight.reshape(-1, *[1] * (t.dim() - 1)) if weight.dim() else weight)


def energy(t: Tensor) -> Tensor:
    """Sums of squares: `[B, ...] -> [B]`."""
    return torch.linalg.vector_norm(t.flatten(1), dim=1).square_()


def columns(left: Tensor, other: Tensor) -> Tensor:
    """Inner products of columns: `[B, n, T], [B, n, S] -> [B, T, S]`."""
    return torch.bmm(left.transpose(1, 2), other)


def rows_of(right: Tensor, other: Tensor) -> Tensor:
    """Inner products of rows: `[B, T, m], [B, S, m] -> [B, T, S]`."""
    return torch.bmm(right, other.transpose(1, 2))


def inner_of(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of matrices: `[B, T, S], [B, T, S] -> [B]`."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def channels(grad: Tensor) -> Tensor:
    """Cotangents of a convolution, `[B, b, n, h, w] -> [B, n, b*h*w]`."""
    return grad.transpose(1, 2).flatten(2)


def patches(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """The patches of a convolution's input, `[B, b, c, h, w] -> [B, b*T, c*kh*kw]`."""
    size, inner = x.shape[:2]
    found = torch.nn.functional.unfold(
        x.flatten(0, 1), kernel, dilation, padding, stride
    )  # [B*b, c*kh*kw, T]
    return found.transpose(1, 2).unflatten(0, (size, inner)).flatten(1, 2)


def rows_rows(i: Tensor, a: Tensor, j: Tensor, b: Tensor, i_padding: int, j_padding: int) -> Tensor:
    """Inner products of two sums of rows, `i [B, T], a [B, T, m]`.

    Rows are paired if their indices are the same.
    """
    i, j = i.flatten(1), j.flatten(1)
    a, b = a.reshape(*i.shape, a.shape[-1]), b.reshape(*j.shape, b.shape[-1])
    meet = (
        (i.unsqueeze(2) == j.unsqueeze(1))
        & (i != i_padding).unsqueeze(2)
        & (j != j_padding).unsqueeze(1)
    )
    products = torch.bmm(a, b.transpose(1, 2))
    return products.masked_fill_(~meet, 0).sum((1, 2))  # a NaN without a partner is left out


def rows_product(
    i: Tensor, a: Tensor, left: Tensor, right: Tensor, padding: int, flipped: bool
) -> Tensor:
    """Inner products of a sum of rows with `left [B, n, T] @ right [B, T, m]`, or its transpose."""
    i = i.flatten(1)
    a = a.reshape(*i.shape, a.shape[-1])
    if flipped:
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    met = left.gather(
        1, i.unsqueeze(2).expand(-1, -1, left.shape[2])
    )  # [B, S, T], the rows of left that the indices name
    met = torch.where((i != padding).unsqueeze(2), met, 0)
    return (met * torch.bmm(a, right.transpose(1, 2))).sum((1, 2))
