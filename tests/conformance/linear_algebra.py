"""Linear algebra, in double precision."""

from __future__ import annotations

import torch

from tests.conformance.suite import Cases, weight

Tensor = torch.Tensor
case = Cases()

D = torch.float64
basis = weight(3, 3, seed=6, dtype=D)
eye = torch.eye(3, dtype=D)


def definite(r):
    """A positive definite matrix with distinct eigenvalues."""
    return r @ r.T + torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=D))


@case(3, 3, dtype=D, weights=[basis])
def solved(r):
    return torch.linalg.solve(definite(r), basis)


@case(3, 3, dtype=D)
def inverted(r):
    return torch.linalg.inv(definite(r))


@case(3, 3, dtype=D)
def cholesky_and_its_solve(r):
    factor = torch.linalg.cholesky(definite(r))
    return torch.cholesky_solve(r, factor)


@case(3, 3, dtype=D)
def triangular(r):
    return torch.linalg.solve_triangular(definite(r).tril(), r, upper=False)


@case(3, 3, dtype=D)
def an_inverse_where_one_exists(r):
    m = r.round()
    inverse, info = torch.linalg.inv_ex(m + eye * 0.01)
    return inverse if info == 0 else m


@case(4, 3, dtype=D)
def qr(r):
    q, upper = torch.linalg.qr(r)
    return q @ upper + upper.diagonal().abs().sum()


@case(3, 3, dtype=D)
def eigenvalues_of_symmetric(r):
    return torch.linalg.eigvalsh(definite(r))


@case(3, 3, dtype=D)
def a_root_by_eigh(r):
    values, vectors = torch.linalg.eigh(definite(r))
    return vectors @ torch.diag(values.sqrt()) @ vectors.mT


@case(4, 3, dtype=D)
def singular_values(r):
    return torch.linalg.svdvals(r)


@case(4, 3, dtype=D)
def a_nuclear_norm(r):
    return torch.linalg.matrix_norm(r, "nuc")


@case(3, 3, dtype=D)
def determinant(r):
    return torch.linalg.det(r)


@case(3, 3, dtype=D)
def sign_and_logarithm_of_the_determinant(r):
    sign, log = torch.linalg.slogdet(r)
    return sign * log


@case(5, 3, dtype=D)
def least_squares(r):
    b = torch.arange(5, dtype=D)[:, None]
    return torch.linalg.lstsq(r, b).solution


@case(4, 3, dtype=D)
def pseudo_inverse(r):
    return torch.linalg.pinv(r)


@case(3, 3, dtype=D)
def exponential(r):
    return torch.linalg.matrix_exp(r * 0.3)


@case(3, 3, dtype=D)
def powers(r):
    return torch.linalg.matrix_power(r, 3)


@case(3, 3, dtype=D, orders=0)
def rank(r):
    return torch.linalg.matrix_rank(torch.outer(r[0], r[1]) + r.round())


@case(3, 3, dtype=D)
def lu_factors(r):
    p, lower, upper = torch.linalg.lu(r)
    return p @ lower @ upper + lower


@case(3, 3, dtype=D)
def jitter_until_it_factors(r):
    m, jitter = r + r.T, 0.1
    while True:
        factor, info = torch.linalg.cholesky_ex(m + jitter * eye)
        if info == 0:
            return factor
        jitter *= 4


@case(3, 3, dtype=D)
def a_factorisation_that_may_fail(r):
    try:
        return torch.linalg.cholesky(r + r.T + eye)
    except torch.linalg.LinAlgError:
        return r


@case(3, 3, dtype=D, weights=[basis])
def bilinear_by_einsum(r):
    return torch.einsum("ij,jk,lk->il", r, basis, r)


@case(3, 3, dtype=D)
def trace_and_diagonal(r):
    return torch.einsum("ii->i", r) * r.trace()


@case(3, dtype=D)
def crossed(r):
    return torch.linalg.cross(r, r.flip(0)) + torch.linalg.vector_norm(r, 3)


@case(2, 3, dtype=D)
def kronecker(r):
    return torch.kron(r, r[:, :2])


@case(3, dtype=D)
def a_product_of_three(r):
    return torch.linalg.multi_dot([torch.outer(r, r), r[:, None], r[None]])


@case(4, 3, dtype=D, orders=1)
def distances(r):
    return torch.cdist(r, r.roll(1, 0) + 3)


@case(4, 3, dtype=D)
def a_covariance(r):
    return torch.cov(r.T) + torch.corrcoef(r.T)


@case(3, 3, dtype=D)
def a_gaussian_process(r):
    x = r[:, 0]
    k = torch.exp(-((x[:, None] - x[None]) ** 2)) + 0.1 * eye
    alpha = torch.linalg.solve(k, r[:, 1])
    return -0.5 * r[:, 1] @ alpha - 0.5 * torch.logdet(k)


@case(3, 3, dtype=D)
def complex_eigenvalues(r):
    values = torch.linalg.eigvals(r)
    return values.real.sum() + values.abs().square().sum()


@case(4, 3, dtype=D)
def tensordot_and_addmm(r):
    return torch.addmm(eye, r.T, r, beta=0.5) + torch.tensordot(r, r, dims=2)


@case(4, dtype=D)
def householder(r):
    v = r / r.norm()
    return torch.eye(4, dtype=D) - 2 * torch.outer(v, v)
