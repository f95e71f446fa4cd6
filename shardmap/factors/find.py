"""Find the recorded values that are products, and their factors.

The search goes backwards from a value through calls that only rearrange or scale it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shardmap._torch import aten
from shardmap.program.ir import Equation, Param, Program, Var
from shardmap.program.operators import op_info


@dataclass(frozen=True, slots=True)
class Term:
    """A matrix `[n, m]`: a product of two recorded values, times recorded numbers."""

    left: Var
    right: Var
    n: int
    m: int
    positions: int
    """T, the number of positions that the product sums over."""
    scales: tuple[tuple[str, Any], ...] = ()
    """`("mul", s)` and `("div", s)`: numbers, and recorded values of one element."""
    flipped: bool = False
    """True if the value is the transpose, `[m, n]`."""

    @property
    def cost(self) -> int:
        """Number of operations to compute it."""
        return 2 * self.n * self.m * self.positions


@dataclass(frozen=True, slots=True)
class Product(Term):
    """`left [n, T] @ right [T, m]`."""


@dataclass(frozen=True, slots=True)
class Rows(Term):
    """Rows of cotangents added up by index: the gradient of an embedding.

    `left` holds T indices, `right [T, m]`.
    """

    padding: int = -1


@dataclass(frozen=True, slots=True)
class Patches(Term):
    """The gradient of a convolution's weight.

    Cotangents `left [b, n, ...]` times the patches of the input, `right [b, c, ...]`.
    """

    weight: tuple[int, ...] = ()
    """The weight's shape."""
    numbers: tuple[Any, ...] = ()
    """The operator's stride, padding, dilation, transposed, output_padding, groups."""

    @property
    def plain(self) -> bool:
        """True if `unfold` makes the patches: two dimensions, neither grouped nor transposed."""
        transposed, _, groups = self.numbers[3:]
        return len(self.weight) == 4 and not transposed and groups == 1


@dataclass(frozen=True, slots=True)
class Factored:
    """A recorded value as a sum of terms of equal size, rearranged to `shape`."""

    terms: tuple[Term, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.terms[0].right.spec.dtype

    def scaled(self, how: str, by: Any) -> Factored:
        """All terms times, or divided by, a number."""
        return replace(
            self, terms=tuple(replace(t, scales=(*t.scales, (how, by))) for t in self.terms)
        )


def sizes(terms: Sequence[Term]) -> str:
    """Text on the sizes of a product's factors."""
    return f"[{terms[0].n}, T] x [T, {terms[0].m}], T = {sum(t.positions for t in terms)}"


MOST_TERMS = 256
"""Most uses of one weight: beyond, as in long recurrences, factors do not pay."""

REARRANGED = {
    aten.detach.default,
    aten.alias.default,
    aten.lift.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
"""Calls that keep a value's elements in their order."""


class Factors:
    """The factors of the values of one program.

    Args:
        program: The program of one sample.
        written: Memory groups that are written in place: their values may change
            later.
        mapped: Memory groups that differ by sample.
    """

    def __init__(self, program: Program, written: set[int], mapped: set[int]):
        self.program = program
        self.written = written
        self.mapped = mapped
        self.makers = {
            v.index: (eq, k)
            for eq in program.equations
            for k, v in enumerate(eq.outs)
            if type(v) is Var
        }
        self._known: dict[int, Factored | None] = {}
        self._read = 0
        """Number of calls that have been visited: in their order, so that long chains need no deep
        recursion."""

    def of(self, var: Var) -> Factored | None:
        """`var` as a sum of products.

        None if it is not a known product or does not depend on the sample.
        """
        if var.index not in self.makers or var.group in self.written:
            return None
        while var.index not in self._known:
            eq = self.program.equations[self._read]
            self._read += 1
            for made in eq.results():
                self._known[made.index] = self._find(made)
        return self._known[var.index]

    def maker(self, var: Var) -> Equation | None:
        """The call that made `var`."""
        found = self.makers.get(var.index)
        return None if found is None else found[0]

    def same(self, var: Var) -> Var:
        """The variable whose elements `var` has, in the same order."""
        eq = self.maker(var)
        while eq is not None and eq.op in REARRANGED and var.group not in self.written:
            (var,) = eq.args[:1]
            eq = self.maker(var)
        return var

    def _find(self, var: Var) -> Factored | None:
        found = self.makers.get(var.index)
        if found is None or var.group in self.written or var.group not in self.mapped:
            return None
        eq, k = found
        if op_info(eq.op).writes or var.spec.dtype not in (torch.float32, torch.float64):
            return None
        if eq.op in REARRANGED:
            inner = self.of(eq.args[0])
            return None if inner is None else replace(inner, shape=tuple(var.spec.shape))
        rule = _RULES.get(eq.op)
        return None if rule is None else rule(self, eq, k, var)

    def _usable(self, *factors: Var) -> bool:
        """True if the factors still hold their values when they are used, and have one dtype."""
        floats = {v.spec.dtype for v in factors if v.spec.dtype.is_floating_point}
        return (
            len(floats) == 1
            and not any(v.group in self.written for v in factors)
            and any(v.group in self.mapped for v in factors)
        )


def _transposed(f: Factors, eq: Equation, k: int, var: Var) -> Factored | None:
    source = eq.args[0]
    if len(source.spec.shape) != 2:
        return None
    if eq.op is aten.transpose.int and {d % 2 for d in eq.args[1:3]} != {0, 1}:
        return f.of(source)
    if eq.op is aten.permute.default and [d % 2 for d in eq.args[1]] != [1, 0]:
        return f.of(source)
    inner = f.of(source)
    if inner is None:
        return None
    t = inner.terms[0]
    if inner.shape != ((t.m, t.n) if t.flipped else (t.n, t.m)):
        return None
    return Factored(
        tuple(replace(t, flipped=not t.flipped) for t in inner.terms), tuple(var.spec.shape)
    )


def _mm(f: Factors, eq: Equation, k: int, var: Var) -> Factored | None:
    left, right = eq.args
    if not f._usable(left, right):
        return None
    n, positions = left.spec.shape
    return Factored(
        (Product(left, right, n, right.spec.shape[1], positions),), (n, right.spec.shape[1])
    )


def _mul(f: Factors, eq: Equation, k: int, var: Var) -> Factored | None:
    """A number times a product, either way round."""
    a, b = eq.args
    for value, by in ((a, b), (b, a)):
        if (
            type(value) is Var
            and _is_number(by)
            and tuple(value.spec.shape) == tuple(var.spec.shape)
        ):
            inner = f.of(value)
            if inner is not None and _scale_is_there(f, by, var):
                return inner.scaled("mul", by)
    return None


def _div(f: Factors, eq: Equation, k: int, var: Var) -> Factored | None:
    value, by = eq.args
    if (
        type(value) is not Var
        or not _is_number(by)
        or tuple(value.spec.shape) != tuple(var.spec.shape)
    ):
        return None
    inner = f.of(value)
    return inner.scaled("div", by) if inner is not None and _scale_is_there(f, by, var) else None


def _neg(f: Factors, eq: Equation, k: int, var: Var) -> Factored | None:
    inner = f.of(eq.args[0])
    return None if inner is None else inner.scaled("mul", -1.0)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float, Param) or (
        type(value) is Var and math.prod(value.spec.shape) == 1
    )


def _scale_is_there(f: Factors, by: Any, var: Var) -> bool:
    return type(by) is not Var or (by.group not in f.written and by.spec.dtype == var.spec.dtype)


def _add(f: Factors, eq: Equation, k: int, var: Var) -> Factored | None:
    """The gradients of a weight that is used more than once."""
    a, b = eq.args
    if dict(eq.kwargs).get("alpha", 1) != 1 or type(a) is not Var or type(b) is not Var:
        return None
    x, y = f.of(a), f.of(b)
    if x is None or y is None or x.shape != y.shape:
        return None
    flipped = {t.flipped for t in (*x.terms, *y.terms)}
    sizes = {(t.n, t.m) for t in (*x.terms, *y.terms)}
    if (
        len(flipped) != 1
        or len(sizes) != 1
        or any(type(t) is Patches for t in (*x.terms, *y.terms))
    ):
        return None
    if len(x.terms) + len(y.terms) > MOST_TERMS:
        return None
    return Factored((*x.terms, *y.terms), x.shape)


def _convolution(f: Factors, eq: Equation, k: int, var: Var) -> Factored | None:
    """The weight's gradient: cotangents times patches."""
    grad, x, weight, _, *numbers, _ = eq.args
    if k != 1 or not f._usable(grad, x):
        return None
    n, *rest = weight.spec.shape
    positions = grad.spec.shape[0] * math.prod(grad.spec.shape[2:])
    term = Patches(
        grad, x, n, math.prod(rest), positions, (), False, tuple(weight.spec.shape), tuple(numbers)
    )
    return Factored((term,), tuple(var.spec.shape))


def _embedding(f: Factors, eq: Equation, k: int, var: Var) -> Factored | None:
    grad, indices, count, padding, by_frequency = eq.args
    if by_frequency or not f._usable(grad, indices):
        return None
    m = grad.spec.shape[-1]
    return Factored(
        (Rows(indices, grad, count, m, math.prod(indices.spec.shape), padding=padding),), (count, m)
    )


_RULES = {
    aten.t.default: _transposed,
    aten.transpose.int: _transposed,
    aten.permute.default: _transposed,
    aten.mm.default: _mm,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.neg.default: _neg,
    aten.add.Tensor: _add,
    aten.convolution_backward.default: _convolution,
    aten.embedding_dense_backward.default: _embedding,
}
