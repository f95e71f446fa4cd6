"""Sums over the samples of a chunk, from the factors.

A sum is one product over all samples and positions, as in an ordinary backward pass.

`sum_i w_i A_i B_i = [w_1 A_1 | w_2 A_2 | ...] [B_1; B_2; ...]`; the weights are those of clipped
sums. Values without factors are summed themselves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardmap._torch import aten
from shardmap.factors.find import REARRANGED, Factored, Patches, Rows, Term, sizes
from shardmap.factors.norms import square, weighted
from shardmap.factors.scales import combined, scale_of
from shardmap.program.ir import Var
from shardmap.rules.fold import flat_rows
from shardmap.rules.lowering import V

if TYPE_CHECKING:
    from shardmap.factors.builder import FactorBuilder


Scales = tuple[tuple[str, Any], ...]


READ = 10
"""Cost of reading an element once, in operations of a product: a third of `norms.PASS`."""


FEW_POSITIONS = 8
"""Most positions of an image at which the weight's gradient of a convolution on CPU is faster as
one product with the unfolded input. Measured for 3x3 kernels and 16 samples, one thread: 512
channels at 2x2 5.5 ms against 19.0, 256 to 512 channels at 2x2 3.6 against 6.6, 256 channels at 4x4
6.0 against 4.6, 128 channels at 8x8 9.2 against 3.3."""


DEEPEST = 32
"""Most calls between an output and the products that it consists of."""


def summed(builder: FactorBuilder, var: Var, scales: Scales = (), depth: int = 0) -> V:
    """The sum over a chunk's samples of a recorded value, times its scales: `[*shape]`."""
    found = builder.factors.of(var) if builder.enabled else None
    if found is not None and not (builder.wanted(var) and _cheaper_dense(found)):
        builder.note(
            builder.factors.maker(var), f"summed over samples from factors {sizes(found.terms)}"
        )
        return _of_factors(builder, found, scales)
    through = builder.enabled and depth < DEEPEST and var.group not in builder.factors.written
    maker = builder.factors.maker(var) if through else None
    shape = tuple(var.spec.shape)
    if maker is not None and var.group in builder.factors.mapped:
        op, args = maker.op, list(maker.args)
        if op in REARRANGED:
            return _part(
                builder,
                torch.Tensor.reshape,
                summed(builder, args[0], scales, depth + 1),
                shape,
                shape=shape,
            )
        if op is aten.cat.default and len(args[0]) > 1:
            d = args[1] if len(args) > 1 else dict(maker.kwargs).get("dim", 0)
            parts = [
                summed(builder, part, scales, depth + 1)
                if part.group in builder.factors.mapped
                else None
                for part in args[0]
            ]
            if all(part is not None for part in parts):
                return _part(builder, side_by_side, d, *parts, shape=shape)
        if op is aten.mul.Tensor:
            for value, by in ((args[0], args[1]), (args[1], args[0])):
                if (
                    type(value) is Var
                    and _sample_number(by, var)
                    and value.spec.shape == var.spec.shape
                    and value.group in builder.factors.mapped
                ):
                    return summed(builder, value, (*scales, ("mul", by)), depth + 1)
        base = square(maker)
        squared = builder.factors.of(base) if base is not None else None
        if (
            squared is not None
            and len(squared.terms) == 1
            and squared.terms[0].positions == 1
            and type(squared.terms[0]) is not Rows
        ):
            builder.note(maker, "squares summed over samples from factors")
            return _of_squares(builder, squared, scales)
    weight = combined(builder, scales, var.spec.dtype)
    return _part(builder, dense, builder.batched(var), weight, shape=shape)


def _cheaper_dense(found: Factored) -> bool:
    """True if a product that is there in any case costs less to read than to compute summed."""
    return READ * found.terms[0].n * found.terms[0].m < sum(t.cost for t in found.terms)


def _sample_number(by: Any, var: Var) -> bool:
    return type(by) is Var and by.spec.shape == () and by.spec.dtype == var.spec.dtype


def _part(builder: FactorBuilder, target: Any, *args: Any, shape: tuple[int, ...]) -> V:
    """Emit a value of the chunk without the mapped dimension."""
    return builder.b.call(target, *args, shape=shape, mapped=True)


def _of_factors(builder: FactorBuilder, found: Factored, scales: Scales) -> V:
    total: V | None = None
    for term in found.terms:
        weight = combined(builder, (*term.scales, *scales), term.right.spec.dtype)
        part = _term(builder, term, weight)
        total = (
            part
            if total is None
            else _part(builder, torch.Tensor.add, total, part, shape=part.shape)
        )
    assert total is not None
    return (
        _part(builder, torch.Tensor.reshape, total, found.shape, shape=found.shape)
        if found.shape != total.shape
        else total
    )


def _term(builder: FactorBuilder, term: Term, weight: V | None) -> V:
    left, right = builder.batched(term.left), builder.batched(term.right)
    n, m = (term.m, term.n) if term.flipped else (term.n, term.m)
    if type(term) is Rows:
        target = _flipped(rows) if term.flipped else rows
        return _part(builder, target, left, right, weight, term.n, term.padding, shape=(n, m))
    if type(term) is Patches:
        target = _flipped(convolution) if term.flipped else convolution
        return _part(
            builder,
            target,
            left,
            right,
            weight,
            term.weight,
            (n, m) if not term.flipped else (m, n),
            *term.numbers,
            shape=(n, m),
        )
    if term.flipped:
        return _part(builder, product_flipped, left, right, weight, shape=(n, m))
    return _part(builder, product, left, right, weight, shape=(n, m))


def _of_squares(builder: FactorBuilder, found: Factored, scales: Scales) -> V:
    """Sum the squares of an outer product: they are the outer product of the squares."""
    term = found.terms[0]
    number = scale_of(builder, term)
    weight = combined(builder, scales, term.right.spec.dtype)
    if number is not None:
        number = builder.b.call(aten.square.default, number, shape=())
        weight = (
            number if weight is None else builder.b.call(aten.mul.Tensor, weight, number, shape=())
        )
    left, right = (_squared(builder, v) for v in (term.left, term.right))
    if type(term) is Patches:  # one position: the kernel is as large as the input
        out = _part(
            builder,
            convolution,
            left,
            right,
            weight,
            term.weight,
            (term.n, term.m),
            *term.numbers,
            shape=(term.n, term.m),
        )
        return _part(builder, torch.Tensor.reshape, out, found.shape, shape=found.shape)
    target = product_flipped if term.flipped else product
    return _part(
        builder,
        torch.Tensor.reshape,
        _part(builder, target, left, right, weight, shape=found.shape),
        found.shape,
        shape=found.shape,
    )


def _squared(builder: FactorBuilder, var: Var) -> V:
    v = builder.batched(var)
    return builder.b.call(aten.square.default, v, shape=v.shape)


def _flipped(target: Any) -> Any:
    def flipped(*args: Any) -> Tensor:
        return target(*args).t().contiguous()

    return flipped


# -- on whole batches


def side_by_side(d: int, *parts: Tensor) -> Tensor:
    """Concatenate parts of a sum along dimension `d`."""
    return torch.cat(parts, d)


def dense(t: Tensor, weight: Tensor | None) -> Tensor:
    """Sum over samples: `[B, *shape] -> [*shape]`; a weighted sum is a product with the weights."""
    if weight is None:
        return t.sum(0)
    if t.dim() == 1 or weight.dim() == 0:
        return weighted(t, weight).sum(0)
    return (weight.reshape(1, -1) @ flat_rows(t)).view(t.shape[1:])


def product(left: Tensor, right: Tensor, weight: Tensor | None) -> Tensor:
    """Sum of products: `[B, n, T], [B, T, m] -> [n, m]`."""
    lefts, rights = _rows(left, right, weight)
    return lefts.t() @ rights


def product_flipped(left: Tensor, right: Tensor, weight: Tensor | None) -> Tensor:
    """Sum of products, transposed: `[B, n, T], [B, T, m] -> [m, n]`."""
    lefts, rights = _rows(left, right, weight)
    return rights.t() @ lefts


def _rows(left: Tensor, right: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flatten both factors to `[B*T, n], [B*T, m]`, the narrower one weighted."""
    if left.shape[1] <= right.shape[2]:
        left = weighted(left, weight)
    else:
        right = weighted(right, weight)
    return left.transpose(1, 2).flatten(0, 1), right.flatten(0, 1)


def rows(i: Tensor, grad: Tensor, weight: Tensor | None, count: int, padding: int) -> Tensor:
    """The gradient of an embedding, `[count, m]`, of all samples' rows."""
    return aten.embedding_dense_backward(weighted(grad, weight), i, count, padding, False)


def convolution(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    shape: tuple[int, ...],
    matrix: tuple[int, int],
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    """The gradient of a convolution's weight, `[n, m]`, summed over all samples.

    It is the ordinary backward pass over the batch.
    """
    grad, x = weighted(grad, weight).flatten(0, 1), x.flatten(0, 1)
    if not grad.shape[0]:
        return grad.new_zeros(matrix)
    plain = len(shape) == 4 and groups == 1 and not transposed
    if grad.device.type == "cpu" and plain and math.prod(grad.shape[2:]) <= FEW_POSITIONS:
        columns = torch.nn.functional.unfold(x, shape[2:], dilation, padding, stride)
        return grad.transpose(0, 1).flatten(1) @ columns.transpose(1, 2).flatten(0, 1)
    # Only its shape is read. On CPU kernels ask for a dense one and copy an expanded number into
    # it: a quarter of the time of a 512 x 512 x 3 x 3 weight. Memory that nobody touches is free.
    like = grad.new_empty(shape if grad.device.type == "cpu" else ()).expand(shape)
    found = aten.convolution_backward(
        grad,
        x,
        like,
        None,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        [False, True, False],
    )
    return found[1].reshape(matrix)
