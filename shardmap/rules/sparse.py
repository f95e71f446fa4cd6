"""Products of dense operands with a sparse matrix that all samples share.

A program holds the parts of such a matrix (indices and values), which are dense tensors like any
others: they are sent, stored and compared like them. The matrix itself is assembled where it
is multiplied, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardmap._torch import indices_of, storage_id, values_of
from shardmap.program.ir import Equation
from shardmap.rules.lowering import Lowering, V
from shardmap.rules.registry import register

_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)
_BY_COLUMN = (torch.sparse_csc, torch.sparse_bsc)
LAYOUTS = (torch.sparse_coo, *_BY_ROW, *_BY_COLUMN)
"""The layouts that are split into parts."""


class Form(NamedTuple):
    """The form of a sparse matrix, by which it is assembled from its parts."""

    size: tuple[int, ...]
    layout: torch.layout
    coalesced: bool
    transposed: bool = False
    """True if the matrix is the transpose of the assembled parts."""


def parts_of(matrix: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a sparse one consists of, its values last; they share its memory."""
    matrix = matrix.detach()
    if matrix.layout is torch.sparse_coo:
        return indices_of(matrix), values_of(matrix)
    if matrix.layout in _BY_ROW:
        return matrix.crow_indices(), matrix.col_indices(), matrix.values()
    return matrix.ccol_indices(), matrix.row_indices(), matrix.values()


def memory_of(tensor: Tensor) -> tuple[int, ...]:
    """The addresses of the storages of a sparse tensor's parts; none for a dense tensor."""
    if tensor.layout not in LAYOUTS:
        return ()
    return tuple([storage_id(part.untyped_storage()) for part in parts_of(tensor)])


def form_of(matrix: Tensor) -> Form:
    """The form by which the results of `parts_of` are assembled."""
    coalesced = matrix.layout is torch.sparse_coo and matrix.is_coalesced()
    return Form(tuple(matrix.shape), matrix.layout, coalesced)


def assembled(parts: Sequence[Tensor], form: Form) -> Tensor:
    """Assemble a sparse matrix from its parts."""
    if form.layout is torch.sparse_coo:
        matrix = torch.sparse_coo_tensor(
            parts[0],
            parts[1],
            form.size,
            is_coalesced=form.coalesced or None,
            check_invariants=False,
        )
    else:
        matrix = torch.sparse_compressed_tensor(
            *parts, size=form.size, layout=form.layout, check_invariants=False
        )
    return matrix.t() if form.transposed else matrix


_library = torch.library.Library("shardmap", "FRAGMENT")
_library.define(
    "sparse_product(Tensor dense, Tensor[] parts, int[] size, Layout layout, bool coalesced, "
    "bool transposed, bool left) -> Tensor"
)


@torch.library.impl(_library, "sparse_product", "CompositeImplicitAutograd")
def _product(
    dense: Tensor,
    parts: Sequence[Tensor],
    size: Sequence[int],
    layout: torch.layout,
    coalesced: bool,
    transposed: bool,
    left: bool,
) -> Tensor:
    matrix = assembled(parts, Form(tuple(size), layout, coalesced, transposed))
    if not left:
        return torch.mm(dense, matrix)
    return torch.mv(matrix, dense) if dense.dim() == 1 else torch.mm(matrix, dense)


OPERATOR = torch.ops.shardmap.sparse_product.default
"""The operator that multiplies a sparse matrix by one sample's operand, or the operand by the
matrix if not `left`."""


@register("sparse", OPERATOR)
def rule(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, object]) -> V:
    """Batch the product as one product with all samples concatenated."""
    spec = eq.outs[0].spec
    return b.call(product_of_all, *args, shape=spec.shape, dtype=spec.dtype)


def product_of_all(
    dense: Tensor,
    parts: Sequence[Tensor],
    size: Sequence[int],
    layout: torch.layout,
    coalesced: bool,
    transposed: bool,
    left: bool,
) -> Tensor:
    """The product of each sample with one sparse matrix, `[N, *shape]`."""
    matrix = assembled(parts, Form(tuple(size), layout, coalesced, transposed))
    n, k, m = dense.shape if dense.dim() == 3 else (*dense.shape, 1)
    if not left:  # [N, k, m] @ [m, c] -> [N, k, c]
        out = torch.mm(dense.reshape(n * k, m), matrix)
        return out.reshape(n, k, matrix.shape[1])
    # [r, k] @ [k, N * m] -> [r, N, m] -> [N, r, m]
    columns = dense.movedim(0, 1).reshape(k, n * m)
    out = torch.mm(matrix, columns.contiguous()).reshape(matrix.shape[0], n, m)
    return out.movedim(1, 0).reshape(n, matrix.shape[0], *dense.shape[2:]).contiguous()
