"""Rules of the linear algebra family.

Their kernels take any number of leading dimensions, so that the map is one more.

Operands get only the dimensions that they lack: an unmapped one is expanded, and one with fewer
dimensions than another gets dimensions of size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardmap._torch import aten, schema_of
from shardmap.program.ir import Equation
from shardmap.rules import registry
from shardmap.rules.fold import unfold
from shardmap.rules.lowering import B, Lowering, V, arguments, values
from shardmap.rules.promote import whole


def _emit(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    results = list(eq.results())
    if not schema_of(eq.op).returns:
        b.effect(eq.op, *args, **kwargs)
        return None
    if len(schema_of(eq.op).returns) == 1:
        spec = results[0].spec
        return b.call(eq.op, *args, shape=spec.shape, dtype=spec.dtype, **kwargs)
    outs = b.calls_several(eq.op, len(eq.outs), *args, **kwargs)
    return tuple(v for v, o in zip(outs, eq.outs, strict=True) if o is not None)


def together(*matrix_dims: int) -> Callable[..., Any]:
    """Make the rule for operators on several stacks, whose kernels do not broadcast reliably.

    On CPU `linalg_lu_solve` solves with the first factors only where one factorisation meets
    several right-hand sides in a batch of such pairs, and `linalg_ldl_solve` reads out of bounds.
    So every operand gets the leading dimensions of all of them, and memory of its own; and these
    dimensions become one (see `_stacked`).

    Args:
        *matrix_dims: Dimensions of one matrix (2) or vector (1), for each tensor operand.
    """

    def rule(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensors = list(values(args))
        known = dict(zip(tensors, matrix_dims, strict=True))
        if any(v.ndim < n for v, n in known.items()):
            return NotImplemented
        leading = torch.broadcast_shapes(*(v.shape[: v.ndim - n] for v, n in known.items()))

        given = [_stacked(b, a, known[a], leading) if type(a) is V else a for a in args]
        found = _emit(b, eq, given, kwargs)
        if not leading:
            return found
        if type(found) is V:
            return unfold(b, found, eq.outs[0].spec.shape)
        shapes = [out.spec.shape for out in eq.outs if out is not None]
        return tuple([unfold(b, v, shape) for v, shape in zip(found, shapes, strict=True)])

    return rule


def _stacked(b: Lowering, v: V, matrix_dims: int, leading: tuple[int, ...]) -> V:
    """One stack of matrices or vectors, dense: `[B, *leading, m, n] -> [B * leading, m, n]`.

    The kernels step from matrix to matrix by the stride of the last dimension before it, which
    means nothing where that dimension has size 1: `lu_solve(factors[:, None], pivots[:, None],
    right[:, None])` solves with the first matrix, or reads out of bounds.
    """
    shape = v.shape[v.ndim - matrix_dims :]
    v = whole(b, v, (*leading, *shape))
    return b.call(torch.Tensor.flatten, v, 0, len(leading), shape=shape) if leading else v


def one_stack(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The rule for operators on one stack of matrices: the map is one more leading dimension."""
    return _emit(b, eq, args, kwargs)


ONE_OPERAND = (
    "linalg_cholesky_ex",
    "cholesky",
    "cholesky_inverse",
    "linalg_inv_ex",
    "_linalg_svd",
    "_linalg_eigh",
    "linalg_eig",
    "linalg_lu",
    "linalg_lu_factor_ex",
    "linalg_ldl_factor_ex",
    "linalg_matrix_exp",
    "geqrf",
)
SEVERAL = {
    "linalg_solve_triangular": (2, 2),
    "triangular_solve": (2, 2),
    "cholesky_solve": (2, 2),
    "linalg_lu_solve": (2, 1, 2),
    "linalg_ldl_solve": (2, 1, 2),
    "linalg_householder_product": (2, 1),
    "ormqr": (2, 1, 2),
}
"""Dimensions of a matrix (2) or vector (1), for each operand."""

registry.register("linalg", *registry.overloads(*ONE_OPERAND))(one_stack)


@registry.register("linalg", aten.linalg_qr.default)
def qr(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
    """Batch `qr`, which has one empty Q for all matrices where only R is asked for."""
    a = arguments(eq, args, kwargs)
    if a["mode"] != "r":
        return one_stack(b, eq, args, kwargs)

    def rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty((x.shape[0], 0)), aten.linalg_qr(x, "r")[1]

    return b.calls_several(rows, 2, b.batch(a["A"]))


for _name, _dims in SEVERAL.items():
    registry.register("linalg", *registry.overloads(_name))(together(*_dims))


def as_recorded(stack: torch.Tensor, contiguous: bool) -> torch.Tensor:
    """Matrices with memory in one piece, or with the transposes' memory in one piece."""
    if stack.is_contiguous() == contiguous:
        return stack
    return stack.contiguous() if contiguous else stack.mT.contiguous().mT


@registry.register("linalg", *registry.overloads("_linalg_det", "_linalg_slogdet"))
def determinant(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batch determinants; each kernel factorises the transpose of a contiguous real matrix.

    The recorded backward relies on which of both it was, and whether a batch is contiguous does
    not tell if its samples are.
    """
    matrix = args[0]
    if not matrix.dtype.is_complex:
        recorded = eq.args[0].spec
        contiguous = is_dense(recorded.shape, recorded.stride)
        matrix = b.call(as_recorded, b.batch(matrix), contiguous, shape=matrix.shape)
    return _emit(b, eq, [matrix, *args[1:]], kwargs)


def _factorises_transposes() -> bool:
    """True if this torch's `_linalg_solve_ex` factorises the transpose of a contiguous matrix."""
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device="cpu")
    factors = aten._linalg_solve_ex.default(matrix, matrix)[1]
    return float(factors[0, 0]) == 2.0  # the largest entry of the first row; 3 is of the column


_FACTORISES_TRANSPOSES = _factorises_transposes()


@registry.register("linalg", *registry.overloads("_linalg_solve_ex"))
def solve(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batch `solve` as a factorisation of each matrix, then a solution for each right-hand side.

    In some versions of torch the kernel factorises the transpose of a contiguous matrix, and its
    recorded backward relies on that; whether a batch is contiguous does not tell if its samples
    are. A vector on the right becomes a column: with a map before it, it would be read as a matrix.
    """
    named = arguments(eq, tuple(args), kwargs)
    matrix, right = named["A"], named["B"]
    recorded = eq.args[0].spec
    contiguous = is_dense(recorded.shape, recorded.stride)
    transposed = _FACTORISES_TRANSPOSES and contiguous and not matrix.dtype.is_complex
    vector = right.ndim == 1 or right.shape == matrix.shape[:-1]
    column = b.view(right, (*right.shape, 1)) if vector else right
    leading = torch.broadcast_shapes(matrix.shape[:-2], column.shape[:-2])
    factored = b.transpose(b.batch(matrix), -2, -1) if transposed else b.batch(matrix)
    factors, pivots, info = b.calls_several(
        aten.linalg_lu_factor_ex.default, 3, factored, check_errors=named["check_errors"]
    )
    factors = factors._replace(shape=matrix.shape)
    pivots = pivots._replace(shape=matrix.shape[:-1])
    solution = b.call(
        aten.linalg_lu_solve.default,
        _stacked(b, factors, 2, leading),
        _stacked(b, pivots, 1, leading),
        _stacked(b, column, 2, leading),
        named={"left": named["left"], "adjoint": transposed},
        shape=column.shape[-2:],
        dtype=matrix.dtype,
    )
    if leading:
        solution = unfold(b, solution, (*leading, *column.shape[-2:]))
    if vector:
        solution = b.reshape(solution, eq.outs[0].spec.shape)
    found = (solution, factors, pivots, info)
    return tuple([v for v, out in zip(found, eq.outs, strict=True) if out is not None])


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """True if a tensor of this shape and these strides is contiguous."""
    step = 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        if n > 1 and s != step:
            return False
        step *= n
    return True


@registry.register("linalg", *registry.overloads("_linalg_check_errors"))
def check_errors(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise if any sample failed."""
    info, name, *_ = args
    b.effect(eq.op, info, name, is_matrix=False)


@registry.register("linalg", *registry.overloads("lu_unpack"))
def lu_unpack(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Batch `lu_unpack`; results that were not requested are empty tensors of each sample.

    The kernel returns them without the mapped dimension.
    """
    factors, *rest = args
    if any(type(v) is V and v.ndim != factors.ndim - 1 for v in rest):
        return NotImplemented
    outs = b.calls_several(
        eq.op,
        3,
        whole(b, factors, factors.shape),
        *[whole(b, v, v.shape) if type(v) is V else v for v in rest],
        **kwargs,
    )
    specs = [out.spec for out in eq.outs]
    return tuple(
        b.call(torch.Tensor.new_empty, b.batch(factors), [B, 0], shape=(0,), dtype=spec.dtype)
        if spec.shape == (0,)
        else v
        for v, spec in zip(outs, specs, strict=True)
    )
