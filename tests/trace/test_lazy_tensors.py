"""Symbolic zeros of forward-mode AD, lazy conjugates and lazy negatives, against the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import shardmap
from tests import oracle

Function = Callable[[torch.Tensor], torch.Tensor]

torch.manual_seed(0)
c = torch.randn(3, dtype=torch.float64)
d = torch.rand(3, dtype=torch.float64) + 1
m = torch.randn(3, 3, dtype=torch.float64)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
net.requires_grad_(False)

SCALED: dict[str, Function] = {
    "add": lambda r: torch.add(r * r, c, alpha=2),
    "add of itself": lambda r: torch.add(c, r * r, alpha=2),
    "add a number": lambda r: (r * r).add(3, alpha=2) + torch.add(c, 2, alpha=3),
    "sub": lambda r: torch.sub(r.sin(), c, alpha=3),
    "sub from it": lambda r: torch.sub(c, r.sin(), alpha=3),
    "rsub": lambda r: torch.rsub(c, r * r, alpha=0.5),
    "rsub itself": lambda r: torch.rsub(r * r, c, alpha=0.5),
    "addcmul": lambda r: torch.addcmul(c, r, d, value=3),
    "addcmul of two": lambda r: torch.addcmul(r, r * r, c, value=0.5),
    "addcdiv": lambda r: torch.addcdiv(c, r * r, d, value=3),
    "addcdiv by itself": lambda r: torch.addcdiv(r, c, r * r + 1, value=3),
    "addr": lambda r: torch.addr(m, r, c, beta=2, alpha=3),
    "addr of one": lambda r: torch.addr(r.outer(r), c, d, beta=2, alpha=3),
    "addmm": lambda r: torch.addmm(m, r.outer(r), m, beta=2, alpha=3),
    "addmm to it": lambda r: torch.addmm(r.outer(r), m, m, beta=2, alpha=3),
    "addmv": lambda r: torch.addmv(r * r, m, c, beta=2, alpha=3),
    "addmv of it": lambda r: torch.addmv(c, m, r * r, beta=2, alpha=3),
    "baddbmm": lambda r: torch.baddbmm(m[None], r.outer(r)[None], m[None], beta=2, alpha=3),
    "addbmm": lambda r: torch.addbmm(m, m[None], r.outer(r)[None], beta=2, alpha=3),
    "ldexp": lambda r: torch.ldexp(r * r, torch.tensor([1, 2, 3])),
    "index_add": lambda r: torch.zeros(3, dtype=r.dtype).index_add(
        0, torch.tensor([0, 2, 0]), r * r, alpha=2
    ),
    "index_add to it": lambda r: (r * r).index_add(0, torch.tensor([0, 2, 0]), c, alpha=2),
    "lerp": lambda r: torch.lerp(c, r * r, 0.3) + torch.lerp(r, c, 0.3),
    "mse": lambda r: F.mse_loss(net(r), c),
    "mse to it": lambda r: F.mse_loss(c, net(r), reduction="none"),
    "smooth l1": lambda r: F.smooth_l1_loss(net(r), c, beta=0.1),
    "hypot": lambda r: torch.hypot(r, d),
    "where": lambda r: torch.where(c > 0, r * r, c),
    "cat": lambda r: torch.cat([r * r, c]),
    "stack": lambda r: torch.stack([c, r * r]).prod(0),
    "matmul": lambda r: (r.outer(r) @ m) @ c,
    "cross": lambda r: torch.linalg.cross(r * r, c),
    "dot": lambda r: torch.dot(r * r, c) + torch.dot(c, c),
    "write a piece": lambda r: torch.zeros(4, dtype=r.dtype).index_copy(
        0, torch.tensor([1, 2, 3]), r * r
    ),
    "infinite factor": lambda r: torch.add(r * r * float("inf"), c, alpha=2).nan_to_num(0, 1, -1),
    "no tangent at all": lambda r: torch.add(c, d, alpha=2) + r.detach(),
    "complex": lambda r: torch.view_as_real(torch.complex(r, c).conj() * torch.complex(c, d)),
}


def jvp(f: Function) -> Function:
    return lambda r: torch.func.jvp(f, (r,), (r.cos(),))[1]


def hessian(f: Function) -> Function:
    return torch.func.hessian(f)


def hvp(f: Function) -> Function:
    return lambda r: torch.func.jvp(torch.func.grad(lambda q: f(q).sum()), (r,), (r.cos(),))[1]


def dual(f: Function) -> Function:
    """Forward AD without `torch.func`; a result without a tangent has a tangent of zeros."""

    def function(r: torch.Tensor) -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            out = f(torch.autograd.forward_ad.make_dual(r, r.cos()))
            tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
            return torch.zeros_like(out) if tangent is None else tangent

    return function


WAYS = {"jvp": jvp, "jacfwd": torch.func.jacfwd, "hessian": hessian, "hvp": hvp, "dual": dual}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("size", [1, 3])
def test_a_symbolic_zero_meets_a_scale(name: str, way: str, size: int) -> None:
    x = torch.randn(size, 3, dtype=torch.float64)
    f = WAYS[way](SCALED[name])
    if (name, way) == ("mse", "hvp"):  # the loop raises "ZeroTensors are immutable"
        want = torch.stack([torch.func.hessian(SCALED[name])(r) @ r.cos() for r in x])
    else:
        want = torch.stack([f(r) for r in x])
    oracle.assert_same(shardmap.vmap(f)(x), want, "recorded at each call")
    mapped = shardmap.vmap(f, trace="once", chunk_size=2)
    for _ in range(2):
        oracle.assert_same(mapped(x), want, "recorded once")


@pytest.mark.parametrize("name", [n for n in SCALED if n not in ("infinite factor", "complex")])
def test_the_transforms_of_the_package(name: str) -> None:
    """`shardmap.jacfwd` and `shardmap.hessian`, against torch's own sample by sample."""
    f = SCALED[name]
    x = torch.randn(3, 3, dtype=torch.float64)
    oracle.assert_same(
        shardmap.jacfwd(f)(x), torch.stack([torch.func.jacrev(f)(r) for r in x]), "jacfwd"
    )
    second = torch.stack([torch.func.jacrev(torch.func.jacrev(f))(r) for r in x])
    torch.testing.assert_close(shardmap.hessian(f)(x), second)
    t = torch.randn(3, 3, dtype=torch.float64)
    scalar = lambda r: f(r).sum()
    hessians = torch.stack([torch.func.jacrev(torch.func.jacrev(scalar))(r) for r in x])
    torch.testing.assert_close(
        shardmap.hvp(scalar)(x, t)[1], torch.einsum("nij,nj->ni", hessians, t)
    )


def zero(like: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._efficientzerotensor(like.shape, dtype=like.dtype)


ZEROS: dict[str, Function] = {
    "returned": lambda r: zero(r),
    "scaled": lambda r: r + torch.mul(zero(r), 2.0),
    "added a number": lambda r: r * torch.add(zero(r), 2.0),
    "a view of it": lambda r: zero(r)[1:] + r[1:],
    "divided": lambda r: zero(r) / r + torch.ones(3),
    "read by python": lambda r: r + (1.0 if zero(r).sum().item() == 0 else 2.0),
    "written": lambda r: r.clone().copy_(zero(r)),
}


@pytest.mark.parametrize("name", ZEROS)
def test_a_symbolic_zero_made_inside(name: str) -> None:
    """It reaches rules and outputs; what is returned has memory, as the loop's stacked zeros."""
    x = torch.randn(3, 3)
    want = torch.stack([ZEROS[name](r) for r in x])
    got = shardmap.vmap(ZEROS[name])(x)
    oracle.assert_same(got, want, name)
    assert not got._is_zerotensor()


def test_a_captured_symbolic_zero() -> None:
    x, z = torch.randn(3, 3), zero(torch.randn(3))
    f = lambda r: torch.mul(z, 2.0) + r
    oracle.assert_same(shardmap.vmap(f)(x), x, "captured")
    oracle.assert_same(shardmap.vmap(lambda r: z)(x), torch.zeros(3, 3), "returned")


COMPLEX: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda r: F.linear(r.conj(), r.outer(r)),
    "einsum": lambda r: torch.einsum("i,ij,j->i", r.conj(), r.outer(r), r.conj()),
    "inner": lambda r: torch.inner(r.conj(), r),
    "matmul": lambda r: r.outer(r).conj() @ r.conj(),
    "norm": lambda r: (r.conj() * r).sum() + r.conj().imag.sum(),
    "negative": lambda r: r.conj().imag * 2 + r.conj().imag.square(),
    "multi_dot": lambda r: torch.linalg.multi_dot([r.outer(r).conj(), r.outer(r), r.conj()]),
    "trapezoid": lambda r: torch.trapezoid(r.conj()),
    "tensordot": lambda r: torch.tensordot(r.conj(), r.outer(r).conj(), 1),
    "kron": lambda r: torch.kron(r.conj(), r),
    "baddbmm": lambda r: torch.baddbmm(
        r.outer(r)[None].conj(), r.outer(r)[None].conj(), r.outer(r)[None], alpha=2
    ),
    "scaled": lambda r: r.conj().mul(2j) + r.conj().add(1, alpha=3),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", COMPLEX)
def test_a_lazy_conjugate_meets_a_composite_operator(name: str, inference: bool) -> None:
    x: Any = torch.randn(3, 3, dtype=torch.complex128)
    with torch.inference_mode(inference):
        want = torch.stack([COMPLEX[name](r) for r in x])
        torch.testing.assert_close(shardmap.vmap(COMPLEX[name])(x), want)
        lazy = x.conj()
        want = torch.stack([COMPLEX[name](r * lazy[0]) for r in x])
        got = shardmap.vmap(lambda r: COMPLEX[name](r * lazy[0]))(x)
        torch.testing.assert_close(got, want)


def test_hessian_with_weights_that_numpy_sees() -> None:
    """Symbolic zeros have no memory that a captured tensor shared with numpy could lie in."""
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    layers.append(torch.nn.Tanh()).append(torch.nn.Linear(4, 1)).double().requires_grad_(False)
    # from now on these storages cannot be resized, as foreign memory cannot
    seen = [weight.numpy() for weight in layers.parameters()]
    x = torch.randn(5, 3, dtype=torch.float64)

    def f(row: torch.Tensor) -> torch.Tensor:
        return layers(row)[0]

    loop = torch.stack([torch.func.hessian(f)(row) for row in x])
    torch.testing.assert_close(shardmap.hessian(f)(x), loop)
    assert len(seen) == 6
