"""A captured sparse matrix times what differs by sample: values and gradients of the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap import MemmapSink, errors

torch.manual_seed(0)
A = torch.randn(4, 3, dtype=torch.float64)
A[A.abs() < 0.6] = 0
MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "uncoalesced": lambda m: torch.sparse_coo_tensor(
        m.to_sparse().indices().repeat(1, 2), m.to_sparse().values().repeat(2) / 2, m.shape
    ),
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
}
x = torch.randn(7, 3, dtype=torch.float64)
X = torch.randn(7, 3, 5, dtype=torch.float64)
b, B = torch.randn(4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)

VECTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "at": lambda s, r: s @ r,
    "mv": lambda s, r: torch.mv(s, r.sin()),
    "matmul": lambda s, r: torch.matmul(s, r * 2),
    "transposed": lambda s, r: s.t() @ (s @ r),
    "twice_transposed": lambda s, r: s.t().t() @ r,
    "addmv": lambda s, r: torch.addmv(b, s, r, beta=0.5, alpha=2),
    "method": lambda s, r: s.mv(r) + b,
    "detached": lambda s, r: s.detach() @ r,
    "dense_form": lambda s, r: s.to_dense() @ r,
    "row_sums": lambda s, r: torch.sparse.sum(s.to_sparse_coo().coalesce(), 0).to_dense() * r,
    "times_a_number": lambda s, r: (s * 2) @ r,
    "normalised": lambda s, r: (s @ r) / (s @ torch.ones(3, dtype=torch.float64)).exp(),
}
SQUARES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "at": lambda s, r: s @ r,
    "mm": lambda s, r: torch.mm(s, r.cos()),
    "sparse_mm": lambda s, r: torch.sparse.mm(s, r),
    "addmm": lambda s, r: torch.addmm(B, s, r, beta=0.5, alpha=-1),
    "addmm_of_a_row": lambda s, r: torch.addmm(B[0], s, r),
    "sparse_addmm": lambda s, r: torch.sparse.addmm(B, s, r, beta=2, alpha=3),
    "adds_what_differs": lambda s, r: torch.addmm(r[:1].expand(4, 5), s, r),
    "beta_zero": lambda s, r: torch.addmm(B * float("nan"), s, r, beta=0),
    "from_the_right": lambda s, r: r.t() @ s.t(),
    "transpose": lambda s, r: s.transpose(0, 1) @ (s @ r),
    "not_contiguous": lambda s, r: s @ r.t().contiguous().t()[:, ::2],
    "powers": lambda s, r: s @ (s.t() @ (s @ r)),
}
WAYS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 3},
    {"devices": ["cpu"] * 2},
    {"trace": "once", "chunk_size": 2},
    {"check": "always"},
    {"strict": True},
]


def looped(f: Callable[..., Any], rows: Tensor) -> Any:
    found = [f(r) for r in rows]
    if isinstance(found[0], tuple):
        return tuple(torch.stack(column) for column in zip(*found, strict=True))
    return torch.stack(found)


def cases() -> list[Any]:
    both = [(n, f, x) for n, f in VECTORS.items()] + [(n, f, X) for n, f in SQUARES.items()]
    return [
        pytest.param(kind, f, rows, id=f"{kind}-{name}-{rows.dim() - 1}d")
        for kind in MATRICES
        for name, f, rows in both
        if name != "addmv" or "co" not in kind  # torch has no kernel of it for COO
    ]


@pytest.mark.parametrize(("kind", "f", "rows"), cases())
def test_products(kind: str, f: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> None:
    """Values, first and second derivatives inside, outer gradients; each way of running."""
    matrix = MATRICES[kind](A)
    one = lambda r: f(matrix, r)

    def derivatives(r: Tensor) -> tuple[Tensor, Tensor]:
        r = r.detach().requires_grad_()
        (first,) = torch.autograd.grad(one(r).sin().sum(), r, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), r)
        return first.detach(), second

    want, want_inside = looped(one, rows), looped(derivatives, rows)
    leaf = rows.clone().requires_grad_()
    (outside,) = torch.autograd.grad(looped(one, leaf).cos().sum(), leaf)
    for way in WAYS:
        torch.testing.assert_close(shardmap.vmap(one, **way)(rows), want, msg=str(way))
        torch.testing.assert_close(shardmap.vmap(derivatives, **way)(rows), want_inside)
        (got,) = torch.autograd.grad(shardmap.vmap(one, **way)(leaf).cos().sum(), leaf)
        torch.testing.assert_close(got, outside)
    for size in (0, 1):
        assert shardmap.vmap(one)(rows[:size]).shape == (size, *want.shape[1:])


@pytest.mark.parametrize("kind", MATRICES)
def test_transforms(kind: str) -> None:
    """Jacobians, Hessians and per-sample gradients through a product."""
    matrix = MATRICES[kind](A)
    f = lambda r: (matrix @ r).tanh()
    want = looped(lambda r: torch.autograd.functional.jacobian(f, r), x)
    torch.testing.assert_close(shardmap.jacrev(f)(x), want)
    g = lambda r: (matrix @ r).tanh().sum()
    want = looped(lambda r: torch.autograd.functional.hessian(g, r), x)
    for forward in (shardmap.hessian, shardmap.jacfwd):  # torch itself has no kernels for it
        with pytest.raises(errors.UnsupportedOperatorError, match="jacrev, also of a gradient"):
            forward(g)(x)

    def gradient(r: Tensor) -> Tensor:
        r = r.view_as(r) if r.requires_grad else r.detach().requires_grad_()
        return torch.autograd.grad(g(r), r, create_graph=True)[0]

    torch.testing.assert_close(shardmap.jacrev(gradient)(x), want)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    h = lambda r: torch.autograd.grad((weight @ (matrix @ r)).sin().sum(), weight)[0]
    torch.testing.assert_close(shardmap.vmap(h, chunk_size=3)(x), looped(h, x))


@pytest.mark.parametrize("kind", MATRICES)
def test_passed_nested_stored_and_reduced(kind: str, tmp_path: Any) -> None:
    """An unmapped argument, a map inside a map, a store, a sum."""
    matrix = MATRICES[kind](A)
    want = looped(lambda r: matrix @ r, x)
    for way in WAYS:
        got = shardmap.vmap(lambda s, r: s @ r, (None, 0), **way)(matrix, x)
        torch.testing.assert_close(got, want)
    nested = shardmap.vmap(shardmap.vmap(lambda r: matrix @ r, 1, 1))
    torch.testing.assert_close(nested(X), looped(lambda r: matrix @ r, X))
    store = shardmap.vmap(lambda r: matrix @ r, out=MemmapSink(tmp_path / "s"), chunk_size=2)(x)
    torch.testing.assert_close(store.read(store.header.outputs[0].name, 0, 7), want)
    got = shardmap.vmap(lambda r: matrix @ r, reduce="sum", chunk_size=2)(x)
    torch.testing.assert_close(got, want.sum(0))


@pytest.mark.parametrize("kind", ["coo", "csr", "csc"])
def test_what_is_remembered_follows_the_matrix(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """`trace="once"`: values written in place, another matrix, one that gets other memory."""
    holder = {"s": MATRICES[kind](A)}
    mapped = shardmap.vmap(lambda r: holder["s"] @ r, trace="once")
    with caplog.at_level(logging.WARNING, "shardmap"):
        for _ in range(3):
            torch.testing.assert_close(mapped(x), looped(lambda r: holder["s"] @ r, x))
            holder["s"].values().mul_(2)
        holder["s"] = MATRICES[kind](A * 3)
        torch.testing.assert_close(mapped(x), looped(lambda r: holder["s"] @ r, x))
        if kind == "coo":
            holder["s"].add_(torch.ones(4, 3, dtype=torch.float64).to_sparse())
            torch.testing.assert_close(mapped(x), looped(lambda r: holder["s"] @ r, x))
    assert "records at each call" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for kind in MATRICES:
        matrix = MATRICES[kind](A.to(dtype))
        rows = x.to(dtype)
        got = shardmap.vmap(lambda r, s=matrix: s @ r)(rows)
        torch.testing.assert_close(got, looped(lambda r, s=matrix: s @ r, rows))


def test_a_large_graph_takes_one_product() -> None:
    """A graph convolution: 200 features on 500 nodes, 12 samples."""
    torch.manual_seed(1)
    edges = torch.randint(500, (2, 3000))
    graph = torch.sparse_coo_tensor(edges, torch.rand(3000), (500, 500)).coalesce()
    weight = torch.randn(6, 4, requires_grad=True)

    def loss(r: Tensor) -> Tensor:
        return (graph @ (torch.relu(graph @ r) @ weight)).pow(2).mean()

    rows = torch.randn(12, 500, 6)
    f = lambda r: torch.autograd.grad(loss(r), weight)[0]
    torch.testing.assert_close(shardmap.vmap(f, strict=True)(rows), looped(f, rows))


REFUSED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any], str]] = {
    "made_of_what_differs": (
        lambda r: torch.sparse_coo_tensor(torch.tensor([[0, 1, 1], [2, 0, 2]]), r, (2, 3)) @ r,
        lambda r: torch.zeros(2, 3, dtype=torch.float64).index_put(
            (torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2])), r, accumulate=True) @ r,
        "index_put",
    ),
    "made_sparse": (
        lambda r: torch.diag(r + 9).to_sparse_csr() @ r,
        lambda r: torch.diag(r + 9) @ r,
        "index_put|shape of",
    ),
    "elementwise": (
        lambda r: (A.to_sparse() * r.expand(4, 3)).to_dense(),
        lambda r: A.to_sparse().to_dense() * r.expand(4, 3),
        "to_dense",
    ),
    "added": (
        lambda r: r.expand(4, 3) + A.to_sparse(),
        lambda r: r.expand(4, 3) + A.to_sparse().to_dense(),
        "to_dense",
    ),
    "requires_grad": (
        lambda r: LEARNED @ r,
        lambda r: LEARNED.detach() @ r,
        "detach",
    ),
    "written": (
        lambda r: CAPTURED.mul_(2) @ r,
        lambda r: CAPTURED.to_dense().mul(2) @ r,
        "to_dense",
    ),
    "values_written": (
        lambda r: CAPTURED.values().mul_(r[0]),
        lambda r: CAPTURED.values() * r[0],
        "share",
    ),
}  # fmt: skip
LEARNED = A.to_sparse().requires_grad_()
CAPTURED = A.to_sparse_csr()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_remedy_that_works(name: str) -> None:
    f, remedy, said = REFUSED[name]
    with pytest.raises(errors.ShardmapError, match=said):
        shardmap.vmap(f)(x)
    torch.testing.assert_close(CAPTURED.to_dense(), A)
    torch.testing.assert_close(shardmap.vmap(remedy)(x), looped(remedy, x))
