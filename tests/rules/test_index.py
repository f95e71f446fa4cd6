"""Indexing rules against the loop."""

from __future__ import annotations

import pytest
import torch

import shardmap
from tests.rules.against_loop import below, check, distinct, real

MASK = torch.tensor([True, False, True])
SHARED = torch.tensor([[0], [-1]])

READS = {
    "x[i]": (lambda x, i: x[i], real(4, 3), below(4, 2, low=-4)),
    "x[i] scalar": (lambda x, i: torch.ops.aten.index(x, [i]), real(4, 3), below(4)),
    "x[i] wide": (lambda x, i: x[i], real(4, 3), below(4, 2, 3)),
    "x[:, i]": (lambda x, i: x[:, i], real(2, 4, 3), below(4, 2)),
    "x[i, j]": (lambda x, i, j: x[i, j], real(4, 3, 2), below(4, 2, 1), below(3, 5)),
    "x[:, i, j]": (lambda x, i, j: x[:, i, j], real(2, 4, 3), below(4, 2, 1), below(3, 5)),
    "x[i, :, j]": (lambda x, i, j: x[i, :, j], real(4, 2, 3), below(4, 2, 1), below(3, 5)),
    "x[:, i, :, j]": (lambda x, i, j: x[:, i, :, j], real(2, 4, 2, 3), below(4, 3), below(3, 2, 3)),
    "x[i, shared]": (lambda x, i: x[i, SHARED], real(4, 3), below(4, 3)),
    "x[none]": (lambda x, i: x[i], real(4, 3), below(4, 0)),
    "x of nothing": (lambda x, i: x[i], real(4, 0), below(4, 2)),
    "gather": (lambda x, i: x.gather(1, i), real(2, 4), below(4, 2, 3)),
    "gather narrow": (lambda x, i: x.gather(-1, i), real(3, 4), below(4, 2, 5)),
    "gather 0": (lambda x, i: x.gather(0, i), real(), below(1)),
    "gather 0-1": (lambda x, i: x.gather(0, i), real(3), below(3)),
    "index_select": (lambda x, i: x.index_select(0, i), real(4, 3), below(4, 2)),
    "index_select 1": (lambda x, i: x.index_select(1, i), real(2, 4, 3), below(4, 2)),
    "index_select scalar": (lambda x, i: x.index_select(0, i), real(4, 3), below(4)),
    "index_select of scalar": (lambda x, i: x.index_select(0, i), real(), below(1)),
    "take_along_dim": (lambda x, i: torch.take_along_dim(x, i, 1), real(2, 4), below(4, 1, 3)),
}

WRITES = {
    "put i": (
        lambda x, i, v: torch.index_put(x, (i,), v, True),
        real(4, 3),
        below(4, 2),
        real(2, 3),
    ),
    "put i row": (
        lambda x, i, v: torch.index_put(x, (i,), v, True),
        real(4, 3),
        below(4, 2),
        real(3),
    ),
    "put i scalar": (
        lambda x, i, v: torch.index_put(x, (i,), v, True),
        real(4, 3),
        below(4, 2),
        real(),
    ),
    "put :, i": (
        lambda x, i, v: torch.ops.aten.index_put(x, [None, i], v, True),
        real(2, 4, 3),
        below(4, 5),
        real(2, 5, 3),
    ),
    "put :, i wide": (
        lambda x, i, v: torch.ops.aten.index_put(x, [None, i], v, True),
        real(2, 4, 3),
        below(4, 2, 2),
        real(2, 1, 3),
    ),
    "put i, :, i": (
        lambda x, i, v: torch.ops.aten.index_put(x, [i, None, i], v, True),
        real(3, 2, 3),
        below(3, 5),
        real(5, 2),
    ),
    "put i, :, i row": (
        lambda x, i, v: torch.ops.aten.index_put(x, [i, None, i], v, True),
        real(3, 2, 3),
        below(3, 5),
        real(2),
    ),
    "put :, i, :, i": (
        lambda x, i, v: torch.ops.aten.index_put(x, [None, i, None, i], v, True),
        real(2, 3, 4, 3),
        below(3, 5),
        real(5, 2, 4),
    ),
    "put mask": (lambda x, v: torch.ops.aten.index_put(x, [None, MASK], v), real(2, 3), real(2, 2)),
    "put i, mask": (
        lambda x, i, v: torch.ops.aten.index_put(x, [i, MASK], v, True),
        real(4, 3),
        below(4, 2),
        real(2),
    ),
    "set": (
        lambda x, i, v: _written(x, lambda y: y.__setitem__(i, v)),
        real(4, 3),
        distinct(4, 2),
        real(2, 3),
    ),
    "set :, i": (
        lambda x, i, v: _written(x, lambda y: y.__setitem__((slice(None), i), v)),
        real(2, 4, 3),
        distinct(4, 2),
        real(3),
    ),
    "set i, :, i": (
        lambda x, i, v: _written(x, lambda y: y.__setitem__((i, slice(None), i), v)),
        real(3, 2, 3),
        distinct(3, 2),
        real(2, 1),
    ),
    "set number": (
        lambda x, i: _written(x, lambda y: y.__setitem__(i, 2.0)),
        real(4, 3),
        below(4, 2),
    ),
    "mask set": (
        lambda x, m: _written(x, lambda y: y.__setitem__(m > 0, 2.0)),
        real(4, 3),
        real(4, 3),
    ),
    "mask set rows": (
        lambda x, m, v: _written(x, lambda y: y.__setitem__(m > 0, v)),
        real(4, 3),
        real(4),
        real(3),
    ),
    "mask set columns": (
        lambda x, m, v: _written(x, lambda y: y.__setitem__((slice(None), m > 0), v)),
        real(4, 3),
        real(3),
        real(4, 1),
    ),
    "mask add": (
        lambda x, m, v: torch.index_put(x, (m > 0,), v, True),
        real(4, 3),
        real(4),
        real(),
    ),
    "scatter": (
        lambda x, i, v: x.scatter(0, i, v),
        real(4, 3),
        lambda g: distinct(4, 3)(g)[:, None].expand(3, 2),
        real(3, 2),
    ),
    "scatter number": (lambda x, i: x.scatter(1, i, 2.0), real(4, 3), below(3, 4, 2)),
    "scatter scalar": (lambda x, i, v: x.scatter(0, i, v), real(), below(1), real()),
    "scatter_": (
        lambda x, i, v: _written(x, lambda y: y.scatter_(1, i, v)),
        real(4, 3),
        lambda g: distinct(3, 3)(g).expand(2, 3),
        real(2, 3),
    ),
    "scatter_ add": (
        lambda x, i, v: _written(x.detach(), lambda y: y.scatter_(1, i, v.detach(), reduce="add")),
        real(4, 3),
        below(3, 2, 3),
        real(4, 3),
    ),
    "scatter_ times": (
        lambda x, i: _written(x.detach(), lambda y: y.scatter_(1, i, 2.0, reduce="multiply")),
        real(4, 3),
        below(3, 2, 3),
    ),
    "scatter_add": (lambda x, i, v: x.scatter_add(0, i, v), real(4, 3), below(4, 5, 2), real(5, 2)),
    "scatter_add_ scalar": (
        lambda x, i, v: _written(x, lambda y: y.scatter_add_(0, i, v)),
        real(),
        below(1),
        real(),
    ),
    "index_add": (
        lambda x, i, v: x.index_add(0, i, v, alpha=2.0),
        real(4, 3),
        below(4, 5),
        real(5, 3),
    ),
    "index_add 1": (lambda x, i, v: x.index_add(1, i, v), real(4, 3), below(3, 5), real(4, 5)),
    "index_add_": (
        lambda x, i, v: _written(x, lambda y: y.index_add_(0, i, v)),
        real(4, 3),
        below(4, 5),
        real(5, 3),
    ),
    "index_add scalar": (lambda x, i, v: x.index_add(0, i, v), real(4), below(4, 1), real(1)),
    "index_add of scalar": (lambda x, i, v: x.index_add(0, i, v), real(), below(1, 1), real()),
    "index_add_ of scalar": (
        lambda x, i, v: _written(x, lambda y: y.index_add_(0, i, v)),
        real(),
        below(1, 1),
        real(),
    ),
    "index_copy of scalar": (lambda x, i, v: x.index_copy(0, i, v), real(), below(1, 1), real()),
    "index_copy": (lambda x, i, v: x.index_copy(0, i, v), real(4, 3), distinct(4, 2), real(2, 3)),
    "index_copy_": (
        lambda x, i, v: _written(x, lambda y: y.index_copy_(1, i, v)),
        real(4, 3),
        distinct(3, 2),
        real(4, 2),
    ),
    "index_fill": (lambda x, i: x.detach().index_fill(1, i, 2.0), real(4, 3), below(3, 2, low=-3)),
    "index_fill tensor": (
        lambda x, v: x.index_fill(1, torch.tensor([0, 2]), v),
        real(4, 3),
        real(),
    ),
    "index_fill tensors": (
        lambda x, i, v: x.detach().index_fill(1, i, v.detach()),
        real(4, 3),
        below(3, 2, low=-3),
        real(),
    ),
    "index_fill row": (
        lambda x, i, v: x.detach().index_fill(0, i, v.detach()),
        real(3),
        below(3),
        real(),
    ),
    "index_fill scalar": (
        lambda x, i, v: x.detach().index_fill(0, i, v.detach()),
        real(),
        below(1),
        real(),
    ),
    "index_fill_": (
        lambda x, i: _written(x, lambda y: y.index_fill_(0, i, 2.0)),
        real(4, 3),
        below(4, 2),
    ),
    "index_fill_ tensor": (
        lambda x, v: _written(x, lambda y: y.index_fill_(0, torch.tensor([0, 2]), v)),
        real(4, 3),
        real(),
    ),
}


def _written(x, write):
    y = x.clone()
    write(y)
    return y


def _reduced(reduce, include):
    return lambda x, i, v: x.scatter_reduce(0, i, v, reduce, include_self=include)


@pytest.mark.parametrize("name", READS)
def test_reads(name):
    """Values and gradients of look-ups."""
    func, *makers = READS[name]
    check(func, *makers)


@pytest.mark.parametrize("name", WRITES)
def test_writes(name):
    """Values and gradients of writes, in place and not."""
    func, *makers = WRITES[name]
    check(func, *makers)


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "prod", "mean", "amax", "amin"])
def test_reductions(reduce, include):
    """Reductions into rows, with and without the rows themselves."""
    check(_reduced(reduce, include), real(4, 2), below(4, 5, 2), real(5, 2), strided=False)
    if reduce != "sum":
        check(
            lambda x, i, v: x.index_reduce(0, i, v, reduce, include_self=include),
            real(4, 2),
            below(4, 5),
            real(5, 2),
            strided=False,
            gradient=False,
        )


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.bfloat16, torch.complex64])
def test_dtypes(dtype):
    """Dtypes other than float64."""
    check(lambda x, i: x[i], real(4, 3, dtype=dtype), below(4, 2), gradient=False)
    check(lambda x, i: x.gather(0, i), real(4, 3, dtype=dtype), below(4, 2, 3), gradient=False)
    check(
        lambda x, i, v: torch.index_put(x, (i,), v),
        real(4, 3, dtype=dtype),
        distinct(4, 2),
        real(2, 3, dtype=dtype),
        gradient=False,
    )
    check(
        lambda x, i, v: x.index_copy(0, i, v),
        real(4, 3, dtype=dtype),
        distinct(4, 2),
        real(2, 3, dtype=dtype),
        gradient=False,
    )


@pytest.mark.parametrize("bad", [4, -1])
def test_a_bad_index_never_reads_another_sample(bad):
    """An index that its sample does not have raises, as in the loop."""
    x, i = torch.randn(3, 4, 2), torch.tensor([[0], [bad], [1]])
    for func in (
        lambda x, i: x.index_select(0, i),
        lambda x, i: torch.gather(x[:, 0], 0, i),
        lambda x, i: x.index_add(0, i, x[:1]),
    ):
        with pytest.raises((IndexError, RuntimeError)):
            shardmap.vmap(func)(x, i)
