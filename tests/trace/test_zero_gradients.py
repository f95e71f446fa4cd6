"""Results of forward mode whose gradient is zero, because symbolic zeros hide a history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import shardmap
from tests.trace.ways import WAYS

Tensor = torch.Tensor
Body = Callable[[Tensor, Tensor, Tensor], Tensor]


def scaled(z: Tensor, i: Tensor, w: Tensor) -> Tensor:
    return z * 2


def weighted(z: Tensor, i: Tensor, w: Tensor) -> Tensor:
    """The tangent depends on the weight, and only formally on the sample."""
    return z * w


def two_rows(z: Tensor, i: Tensor, w: Tensor) -> Tensor:
    y = torch.stack([z, z * 2])
    y[1, i] = 7.0
    y[0, i] -= z[i]
    return y


def written_at_its_own_index(z: Tensor, i: Tensor, w: Tensor) -> Tensor:
    y = z * 2
    y[i].mul_(3.0)
    return y


def picked(z: Tensor, i: Tensor, w: Tensor) -> Tensor:
    return (z * -3)[i]


def with_a_constant(z: Tensor, i: Tensor, w: Tensor) -> Tensor:
    return z * 2 + w.sin()


def divided(z: Tensor, i: Tensor, w: Tensor) -> Tensor:
    return z / w - w * i


def curved(z: Tensor, i: Tensor, w: Tensor) -> Tensor:
    return z.sin() * 2


def dual(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(body(forward_ad.make_dual(x, x.detach().exp()))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "jacfwd": lambda body, x: torch.func.jacfwd(body)(x),
    "jacrev": lambda body, x: torch.func.jacrev(body)(x),
    "jvp": lambda body, x: torch.func.jvp(body, (x,), (-torch.ones_like(x),))[1],
    "forward over reverse": lambda body, x: torch.func.jacfwd(
        torch.func.jacrev(lambda z: body(z).sum())
    )(x),
    "dual": dual,
}
BODIES = [
    scaled, weighted, two_rows, written_at_its_own_index, picked, with_a_constant, divided, curved,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", [*WAYS, {"remat": True, "chunk_size": 2}], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("body", BODIES)
def test_a_result_requires_grad_where_the_loops_does(
    body: Body, transform: str, way: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_()

    def function(x: Tensor, i: Tensor) -> Tensor:
        return TRANSFORMS[transform](lambda z: body(z, i, w), x)

    mapped = shardmap.vmap(function, **way)
    for size in (1, 3, 7, 7):
        x = torch.randn(size, 4, dtype=torch.float64, generator=generator).requires_grad_()
        i = torch.randint(0, 4, (size,), generator=generator)
        wanted = torch.stack([function(*row) for row in zip(x, i, strict=True)])
        found = mapped(x, i)
        torch.testing.assert_close(found, wanted)
        assert torch.equal(found.signbit(), wanted.signbit())
        assert found.requires_grad == wanted.requires_grad
        if wanted.requires_grad:
            got, expected = (
                torch.autograd.grad(y.square().sum(), (x, w), allow_unused=True)
                for y in (found, wanted)
            )
            torch.testing.assert_close(got, expected)
            assert [t is None for t in got] == [t is None for t in expected]


def test_a_result_whose_history_is_hidden_is_used_backward() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    shardmap.vmap(torch.func.jacfwd(lambda z: z * 2))(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros(3, 4))
