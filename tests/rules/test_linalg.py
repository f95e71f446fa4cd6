"""Linear algebra rules against the loop."""

from __future__ import annotations

import warnings

import pytest
import torch

import shardmap
from shardmap.lower import cache
from tests.rules.against_loop import check, real

linalg = torch.linalg


def spd(x):
    return x @ x.mT + 2 * torch.eye(3, dtype=x.dtype)


ONE = {
    "cholesky": (lambda x: linalg.cholesky(spd(x)), real(3, 3)),
    "cholesky of a stack": (lambda x: linalg.cholesky(spd(x), upper=True), real(2, 3, 3)),
    "inv": (lambda x: linalg.inv(spd(x)), real(3, 3)),
    "det": (lambda x: linalg.det(x), real(3, 3)),
    "slogdet": (lambda x: tuple(linalg.slogdet(x)), real(3, 3)),
    "svdvals": (lambda x: linalg.svdvals(x), real(3, 4)),
    "svd": (lambda x: linalg.svd(x, full_matrices=False)[1], real(3, 4)),
    "eigh": (lambda x: linalg.eigh(spd(x)).eigenvalues, real(3, 3)),
    "eigvals": (lambda x: linalg.eigvals(spd(x)).real, real(3, 3)),
    "qr": (lambda x: tuple(linalg.qr(x)), real(4, 3)),
    "qr without q": (lambda x: tuple(linalg.qr(x.detach(), mode="r")), real(2, 4, 3)),
    "complete qr": (lambda x: tuple(linalg.qr(x.detach(), mode="complete")), real(4, 3)),
    "matrix_exp": (lambda x: linalg.matrix_exp(x), real(3, 3)),
    "pinv": (lambda x: linalg.pinv(x), real(3, 2)),
    "trace": (lambda x: torch.trace(x), real(3, 4)),
    "cholesky_inverse": (lambda x: torch.cholesky_inverse(linalg.cholesky(spd(x))), real(3, 3)),
    "lu": (lambda x: tuple(linalg.lu(x)), real(3, 3)),
}
TWO = {
    "solve": (lambda x, y: linalg.solve(spd(x), y), real(3, 3), real(3, 2)),
    "solve a vector": (lambda x, y: linalg.solve(spd(x), y), real(3, 3), real(3)),
    "solve from the right": (
        lambda x, y: linalg.solve(spd(x), y, left=False),
        real(3, 3),
        real(2, 3),
    ),
    "solve stacks": (lambda x, y: linalg.solve(spd(x), y), real(2, 3, 3), real(2, 3, 1)),
    "solve a stack of vectors": (lambda x, y: linalg.solve(spd(x), y), real(2, 3, 3), real(2, 3)),
    "solve_triangular": (
        lambda x, y: linalg.solve_triangular(spd(x), y, upper=True),
        real(3, 3),
        real(3, 2),
    ),
    "solve_triangular broadcast": (
        lambda x, y: linalg.solve_triangular(spd(x), y, upper=False),
        real(3, 3),
        real(2, 3, 2),
    ),
    "cholesky_solve": (
        lambda x, y: torch.cholesky_solve(y, linalg.cholesky(spd(x))),
        real(3, 3),
        real(3, 2),
    ),
}


@pytest.mark.parametrize("name", ONE)
def test_one(name):
    function, make = ONE[name]
    check(function, make, sizes=(3,), tolerance=1e-7)


@pytest.mark.parametrize("name", TWO)
def test_two(name):
    function, *makes = TWO[name]
    check(function, *makes, sizes=(3,), tolerance=1e-7)


def test_a_singular_sample_raises_as_in_the_loop():
    x = torch.eye(3).repeat(3, 1, 1)
    x[2] = 0
    with pytest.raises(linalg.LinAlgError):
        shardmap.vmap(linalg.inv)(x)


@pytest.mark.parametrize("adjoint", [False, True])
def test_one_factorisation_for_several_right_sides(adjoint: bool) -> None:
    """Batched, the kernels solved with the first sample's factors, or read out of bounds."""

    def by_lu(a: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        factors, pivots = torch.linalg.lu_factor(a.unsqueeze(0))
        return torch.linalg.lu_solve(factors, pivots, right, adjoint=adjoint)

    def by_cholesky(a: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        factor = torch.linalg.cholesky((a @ a.mT + torch.eye(3)).unsqueeze(0))
        return torch.cholesky_solve(right, factor)

    def triangular(a: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(
            a.unsqueeze(0) + 3 * torch.eye(3), right, upper=adjoint
        )

    def whole(a: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(a.unsqueeze(0), right)

    for f in (by_lu, by_cholesky, triangular, whole):
        check(f, real(3, 3), real(4, 3, 3), tolerance=1e-7)


def test_one_indefinite_factorisation_for_several_right_sides() -> None:
    """The kernel reads out of bounds where it has to broadcast: factors as they are, expanded."""

    def f(a: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        factors, pivots = torch.linalg.ldl_factor(a + a.mT)
        factors, pivots = factors.expand(4, 3, 3), pivots.expand(4, 3)
        return torch.linalg.ldl_solve(factors, pivots, right)

    check(f, real(3, 3), real(4, 3, 2), gradient=False, tolerance=1e-7)


def test_hessian_of_a_log_determinant() -> None:
    """By finite differences of the gradient: every sample, not the first only."""
    weight = real(3, 3)(torch.Generator().manual_seed(1))

    def value(v: torch.Tensor) -> torch.Tensor:
        return torch.linalg.slogdet(torch.tanh(weight + torch.outer(v, weight[0])))[1]

    rows = torch.stack([real(3)(torch.Generator().manual_seed(i)) for i in range(5)])
    step = 1e-6 * torch.eye(3, dtype=torch.float64)
    gradient = torch.func.grad(value)
    want = torch.stack(
        [torch.stack([(gradient(r + e) - gradient(r - e)) / 2e-6 for e in step]) for r in rows]
    )
    torch.testing.assert_close(shardmap.hessian(value)(rows), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"chunk_size": 2}])
def test_gradients_of_a_solution(options, layout):
    """The factorised matrix depends on torch's version and on the matrix's layout."""
    matrices = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    matrices = matrices @ matrices.mT + 2 * torch.eye(3, dtype=torch.float64)
    matrices += torch.arange(9.0).view(3, 3) / 10  # not symmetric
    batch = matrices.mT.contiguous().mT if layout == "transposed" else matrices
    right = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(2)).double()

    def gradient(a, b):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        return torch.autograd.grad(linalg.solve(a, b).cos().sum(), (a, b))

    shardmap.clear_caches()
    mapped = shardmap.vmap(gradient, **options)
    found = mapped(batch, right)
    for got, want in zip(found, zip(*map(gradient, batch, right), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))
    # By finite differences along one direction, too.
    step, direction = 1e-6, torch.ones(3, 3, dtype=torch.float64)
    for i in range(5):
        ends = [linalg.solve(matrices[i] + s * step * direction, right[i]) for s in (1, -1)]
        slope = (ends[0].cos().sum() - ends[1].cos().sum()) / (2 * step)
        torch.testing.assert_close((found[0][i] * direction).sum(), slope, rtol=1e-5, atol=1e-6)
    assert cache.lowerings()
    for low in cache.lowerings():
        assert low.batched.tiers["aten::_linalg_solve_ex"] == "rule"


@pytest.mark.parametrize("leading", [(1,), (1, 1), (2,), (2, 1), (1, 3)])
@pytest.mark.parametrize("name", ["slogdet", "det", "inv", "lu", "cholesky", "ldl"])
def test_a_stack_of_one_matrix_in_a_sample(name: str, leading: tuple[int, ...]) -> None:
    """Kernels that solve step by a stride that means nothing where a dimension has size 1."""

    def lu(a: torch.Tensor) -> torch.Tensor:
        factors, pivots = linalg.lu_factor(a[0] if leading[0] == 1 else a)
        if leading[0] == 1:
            factors, pivots = factors[None], pivots[None]
        return linalg.lu_solve(factors, pivots, torch.eye(3, dtype=a.dtype).expand_as(a))

    def cholesky(a: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(a, linalg.cholesky(spd(a)))

    def ldl(a: torch.Tensor) -> torch.Tensor:
        return linalg.ldl_solve(*linalg.ldl_factor(a + a.mT), a)

    kinds = {
        "slogdet": torch.func.jacrev(lambda a: linalg.slogdet(a)[1]),
        "det": torch.func.grad(lambda a: linalg.det(a).sin().sum()),
        "inv": torch.func.grad(lambda a: linalg.inv(a).sin().sum()),
        "lu": lu,
        "cholesky": cholesky,
        "ldl": ldl,
    }
    check(kinds[name], real(*leading, 3, 3), gradient=False, tolerance=1e-7)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "last", "first"])
@pytest.mark.parametrize("function", ["slogdet", "det", "complex"])
def test_gradients_of_determinants(function: str, layout: str, size: int) -> None:
    """The backward is recorded for the matrix that the kernel factorised: by its layout."""

    def value(a: torch.Tensor) -> torch.Tensor:
        if function == "complex":
            return linalg.det(a * (1 + 0.5j)).abs()
        return linalg.slogdet(a)[1] if function == "slogdet" else linalg.det(a)

    x = torch.randn(5, size, size, generator=torch.Generator().manual_seed(2)).double()
    batch, dim = {
        "contiguous": (x, 0),
        "transposed": (x.mT, 0),
        "last": (x.permute(1, 2, 0).contiguous(), -1),
        "first": (x.permute(2, 0, 1).contiguous(), 1),
    }[layout]
    rows = batch.unbind(dim)
    for way in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        func = way(value)
        want = torch.stack([func(row) for row in rows])
        for options in ({}, {"chunk_size": 2}, {"devices": ["cpu", "cpu"]}):
            with warnings.catch_warnings():
                warnings.simplefilter("error", shardmap.errors.SlowLoopWarning)
                got = shardmap.vmap(func, dim, **options)(batch)
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
