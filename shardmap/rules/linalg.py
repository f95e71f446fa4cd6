"""Rules of the linear algebra family.

Kernels that take any number of leading dimensions, so that the map is one more.

Only what an operand lacks is put in: an unmapped one is expanded, and ones stand where it has fewer
dimensions than another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardmap.program.ir import Equation
from shardmap.rules import registry
from shardmap.rules.lowering import B, Lowering, V, values

aten = torch.ops.aten


def _emit(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    results = list(eq.results())
    if not eq.op._schema.returns:
        b.effect(eq.op, *args, **kwargs)
        return None
    if len(eq.op._schema.returns) == 1:
        spec = results[0].spec
        return b.call(eq.op, *args, shape=spec.shape, dtype=spec.dtype, **kwargs)
    outs = b.calls_several(eq.op, len(eq.outs), *args, **kwargs)
    return tuple(v for v, o in zip(outs, eq.outs, strict=True) if o is not None)


def stacks(matrix_dims: int) -> Callable[..., Any]:
    """The rule for operators on stacks of matrices.

    Every tensor mapped, with as many leading dimensions as the others.
    """

    def rule(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        ndim = max([matrix_dims, *[v.ndim for v in values(args)]])

        def whole(arg: Any) -> Any:
            return b.align(b.batch(arg), ndim) if type(arg) is V else arg

        return _emit(b, eq, [whole(a) for a in args], kwargs)

    return rule


ONE_OPERAND = (
    "linalg_cholesky_ex",
    "cholesky",
    "cholesky_inverse",
    "linalg_inv_ex",
    "_linalg_det",
    "_linalg_slogdet",
    "_linalg_svd",
    "_linalg_eigh",
    "linalg_eig",
    "linalg_qr",
    "linalg_lu",
    "linalg_lu_factor_ex",
    "linalg_ldl_factor_ex",
    "linalg_matrix_exp",
)
SEVERAL_MATRICES = ("linalg_solve_triangular", "triangular_solve", "cholesky_solve")

registry.register("linalg", *registry.overloads(*ONE_OPERAND, *SEVERAL_MATRICES))(stacks(2))


@registry.register("linalg", *registry.overloads("linalg_householder_product"))
def householder_product(
    b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """A stack of matrices and, with one dimension less, of vectors."""
    return _emit(b, eq, [b.batch(v) for v in args], kwargs)


@registry.register("linalg", *registry.overloads("_linalg_solve_ex"))
def solve(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A vector on the right becomes a column.

    With a map before it, it would be taken for a matrix.
    """
    matrix, right = args[:2]
    if right.ndim != 1 and right.shape != matrix.shape[:-1]:
        return stacks(2)(b, eq, args, kwargs)
    column = b.batch(right)
    column = b.align(b.view(column, (*right.shape, 1)), matrix.ndim)
    solution, *rest = b.calls_several(eq.op, 4, b.batch(matrix), column, *args[2:], **kwargs)
    solution = solution._replace(shape=(*eq.outs[0].spec.shape, 1))
    return (b.view(solution, eq.outs[0].spec.shape), *rest)


@registry.register("linalg", *registry.overloads("_linalg_check_errors"))
def check_errors(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises if any sample failed."""
    info, name, *_ = args
    b.effect(eq.op, info, name, is_matrix=False)


@registry.register("linalg", *registry.overloads("lu_unpack"))
def lu_unpack(b: Lowering, eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What was not asked for is an empty tensor without the mapped dimension.

    Each sample has its own.
    """
    factors, *rest = args
    outs = b.calls_several(
        eq.op, 3, b.batch(factors), *[b.batch(v) if type(v) is V else v for v in rest], **kwargs
    )
    specs = [out.spec for out in eq.outs]
    return tuple(
        b.call(torch.Tensor.new_empty, b.batch(factors), [B, 0], shape=(0,), dtype=spec.dtype)
        if spec.shape == (0,)
        else v
        for v, spec in zip(outs, specs, strict=True)
    )
