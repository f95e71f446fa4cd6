"""Matmul rules against the loop."""

from __future__ import annotations

import pytest
import torch

import shardmap
from shardmap.lower import cache as engine
from shardmap.lower.codegen import generate
from tests.rules.against_loop import check, real

PAIRS = {
    "mm": (torch.mm, real(2, 3), real(3, 4)),
    "mm row": (torch.mm, real(1, 3), real(3, 4)),
    "mm column": (torch.mm, real(2, 3), real(3, 1)),
    "mm outer": (torch.mm, real(2, 1), real(1, 4)),
    "mm one": (torch.mm, real(1, 1), real(1, 1)),
    "mm nothing": (torch.mm, real(2, 0), real(0, 4)),
    "mm no rows": (torch.mm, real(0, 3), real(3, 4)),
    "mm transposed": (lambda x, y: x.t() @ y.t(), real(3, 2), real(4, 3)),
    "mm of vectors' views": (
        lambda x, y: (x.unsqueeze(0).t() @ y.unsqueeze(0)).t(),
        real(3),
        real(4),
    ),
    "vector, matrix": (torch.matmul, real(3), real(3, 4)),
    "matrix, vector": (torch.matmul, real(2, 3), real(3)),
    "three by two": (torch.matmul, real(2, 5, 3), real(3, 4)),
    "two by three": (torch.matmul, real(2, 3), real(5, 3, 4)),
    "four by four": (torch.matmul, real(2, 1, 5, 3), real(1, 2, 3, 4)),
    "transposed view": (
        lambda x, y: x.transpose(0, 1).reshape(10, 3) @ y,
        real(2, 5, 3),
        real(3, 4),
    ),
    "bmm": (torch.bmm, real(2, 5, 3), real(2, 3, 4)),
    "bmm nothing": (torch.bmm, real(0, 5, 3), real(0, 3, 4)),
    "bmm no inner": (torch.bmm, real(2, 5, 0), real(2, 0, 4)),
    "mv": (torch.mv, real(2, 3), real(3)),
    "dot": (torch.dot, real(3), real(3)),
    "dot of nothing": (torch.dot, real(0), real(0)),
    "vdot": (torch.vdot, real(3), real(3)),
    "outer": (torch.outer, real(2), real(3)),
    "kron": (torch.kron, real(2, 2), real(2, 3)),
    "einsum": (lambda x, y: torch.einsum("bij,bkj->ibk", x, y), real(2, 3, 4), real(2, 5, 4)),
}

SUMS = {
    "addmm": (torch.addmm, real(2, 4), real(2, 3), real(3, 4)),
    "addmm vector": (torch.addmm, real(4), real(2, 3), real(3, 4)),
    "addmm row": (torch.addmm, real(1, 4), real(1, 3), real(3, 4)),
    "addmm one row": (torch.addmm, real(4), real(1, 3), real(3, 4)),
    "addmm column": (torch.addmm, real(2, 1), real(2, 3), real(3, 4)),
    "addmm scalar": (torch.addmm, real(), real(1, 3), real(3, 4)),
    "addmm weighted": (
        lambda c, x, y: torch.addmm(c, x, y, beta=0.5, alpha=2),
        real(4),
        real(2, 3),
        real(3, 4),
    ),
    "addmm one row weighted": (
        lambda c, x, y: torch.addmm(c, x, y, beta=0.5, alpha=2),
        real(1),
        real(1, 3),
        real(3, 4),
    ),
    "linear": (
        lambda c, x, w: torch.nn.functional.linear(x, w, c),
        real(4),
        real(2, 5, 3),
        real(4, 3),
    ),
    "linear of a vector": (
        lambda c, x, w: torch.nn.functional.linear(x, w, c),
        real(4),
        real(3),
        real(4, 3),
    ),
    "addmv": (
        lambda c, x, y: torch.addmv(c, x, y, beta=0.5, alpha=2),
        real(2),
        real(2, 3),
        real(3),
    ),
    "addmv scalar": (torch.addmv, real(), real(2, 3), real(3)),
    "addmv one": (torch.addmv, real(1), real(2, 3), real(3)),
    "addr": (lambda c, x, y: torch.addr(c, x, y, beta=0.5, alpha=2), real(2, 3), real(2), real(3)),
    "addr vector": (torch.addr, real(3), real(2), real(3)),
    "baddbmm": (
        lambda c, x, y: torch.baddbmm(c, x, y, beta=0.5, alpha=2),
        real(2, 5, 4),
        real(2, 5, 3),
        real(2, 3, 4),
    ),
    "baddbmm vector": (torch.baddbmm, real(4), real(2, 5, 3), real(2, 3, 4)),
    "addbmm": (
        lambda c, x, y: torch.addbmm(c, x, y, beta=0.5, alpha=2),
        real(5, 4),
        real(2, 5, 3),
        real(2, 3, 4),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    function, *makes = PAIRS[name]
    check(function, *makes)


@pytest.mark.parametrize("name", SUMS)
def test_sums(name):
    function, *makes = SUMS[name]
    check(function, *makes)


@pytest.mark.parametrize("beta", [0, 0.0])
def test_zero_beta_drops_nan(beta):
    nan = torch.full((3, 4), float("nan"))
    x, y, w = torch.randn(3, 2, 5), torch.randn(3, 5, 4), torch.randn(5, 4)
    for right, d in ((y, 0), (w, None)):
        got = shardmap.vmap(lambda c, a, b: torch.addmm(c, a, b, beta=beta), (0, 0, d))(
            nan, x, right
        )
        torch.testing.assert_close(got, x @ right)
        got = shardmap.vmap(lambda c, a, b: torch.addmm(c, a, b, beta=beta), (None, 0, d))(
            nan[0], x, right
        )
        torch.testing.assert_close(got, x @ right)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bfloat16, torch.complex64])
def test_dtypes(dtype):
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    cases = [
        (torch.mm, (2, 3), (3, 4)),
        (torch.mm, (1, 3), (3, 4)),
        (torch.mm, (2, 1), (1, 4)),
        (torch.bmm, (2, 2, 3), (2, 3, 4)),
        (torch.mv, (2, 3), (3,)),
        (torch.dot, (3,), (3,)),
        (torch.vdot, (3,), (3,)),
        (lambda x, y: torch.addmm(y[:1, :4], x, y[:3]), (2, 3), (3, 4)),
        (lambda x, y: torch.addmm(y[0], x, y), (2, 3), (3, 4)),
    ]
    for function, *shapes in cases:
        for dims in ((0, 0), (0, None), (None, 0)):
            args = [make(3, *s) if d == 0 else make(*s) for s, d in zip(shapes, dims, strict=True)]
            got = shardmap.vmap(function, dims)(*args)
            want = torch.stack(
                [
                    function(*[a[i] if d == 0 else a for a, d in zip(args, dims, strict=True)])
                    for i in range(3)
                ]
            )
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want)


def test_second_derivatives():
    def function(x, w, c):
        return torch.tanh(torch.nn.functional.linear(torch.tanh(x @ w), w, c)).sum()

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    c = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *a: shardmap.vmap(function, (0, None, None))(*a), (x, w, c)
    )


def test_views_around_products_cost_nothing(monkeypatch):
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(10)]

    def gradient(x):
        for weight in weights:
            x = torch.tanh(x @ weight)
        return torch.autograd.grad(x.sum(), weights)

    x = torch.randn(3, 4)
    shardmap.clear_caches()
    made = []
    monkeypatch.setattr(
        engine, "generate", lambda batched, *how: made.append(batched) or generate(batched, *how)
    )
    got = shardmap.vmap(gradient)(x)
    want = [torch.stack(column) for column in zip(*map(gradient, x), strict=True)]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    (batched,) = made
    views = [
        c
        for c in batched.chunk
        if any(n in str(c.target) for n in ("view", "squeeze", "transpose", "permute"))
    ]
    assert len(views) <= 2 * len(weights) + 1, (
        "a weight's gradient takes a column and a row; nothing else is left"
    )


def test_factors_written_after_their_outer_product():
    def function(x, y):
        x, y = x * 1, y * 1
        first = (x.unsqueeze(1) @ y.unsqueeze(0)).t()
        x.mul_(2)
        second = (x.unsqueeze(1) @ y.unsqueeze(0)).t()
        third = (x.unsqueeze(1) @ y.unsqueeze(0)).t()
        third.add_(1)
        return first, second, third

    check(function, real(2), real(3), gradient=False)
