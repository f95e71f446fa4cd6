"""Tensors made in the likeness of a mapped one.

Values, dtypes, strides, made once, and each sample's own once written to.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import shardmap
from shardmap.lower import cache as engine
from tests.rules.against_loop import check, real

MAKERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "ones_like_dtype": lambda x: torch.ones_like(x, dtype=torch.int32),
    "full_like": lambda x: torch.full_like(x, 2.5),
    "full_like_nan": lambda x: torch.full_like(x, float("nan")),
    "channels_last": lambda x: torch.zeros_like(
        x.expand(2, 3, 2, 3), memory_format=torch.channels_last
    ).as_strided((36,), (1,)),
    "transposed": lambda x: torch.ones_like(x.t() * 1).as_strided((6,), (1,)),
    "new_zeros": lambda x: x.new_zeros(4, 2),
    "new_ones": lambda x: x.new_ones(4, dtype=torch.bool),
    "new_full": lambda x: x.new_full((2, 1), 7.0),
    "empty_like": lambda x: torch.empty_like(x).zero_(),
    "new_empty": lambda x: x.new_empty(3).fill_(2.0),
    "new_empty_strided": lambda x: (
        x.new_empty_strided((2, 3), (1, 2)).zero_().as_strided((6,), (1,))
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_alone(name: str) -> None:
    """Each factory call is tried as an output, and as an operand."""
    make = MAKERS[name]
    check(make, real(2, 3), gradient=False)
    check(lambda x: make(x).double().sum() + x.sum(), real(2, 3))


@pytest.mark.parametrize("name", MAKERS)
def test_written_by_samples(name: str) -> None:
    """Each sample has its own where it writes a value that differs."""
    make = MAKERS[name]

    def func(x: torch.Tensor) -> torch.Tensor:
        out = make(x)
        before = out.double().nan_to_num().sum()
        out.view(-1)[1:].copy_(x.view(-1)[0])
        return out.double() + before

    check(func, real(2, 3), gradient=False, strided=False)


def test_made_once() -> None:
    """The cotangent of a backward pass, and what follows from it alone, is no work of a chunk."""
    shardmap.clear_caches()

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(x.sum(), x)[0] + x

    x = torch.randn(4, 3)
    assert torch.equal(shardmap.vmap(gradient, chunk_size=2)(x), x + 1)
    (low,) = engine.lowerings()
    assert "filled" in [c.target.__name__ for c in low.batched.fixed]
    names = [getattr(c.target, "__name__", "") for c in low.batched.chunk]
    assert not {"filled", "expand"} & set(names), low.replay.source


def laplacian(x: torch.Tensor) -> torch.Tensor:
    """Forward over forward, whose tangents are copied into memory made like the sample."""

    def along(v: torch.Tensor) -> torch.Tensor:
        def slope(z: torch.Tensor) -> torch.Tensor:
            return torch.func.jvp(lambda z: (z * z).sin().sum(), (z,), (v,))[1]

        return torch.func.jvp(slope, (x,), (v,))[1]

    return torch.stack([along(v) for v in torch.eye(2, dtype=x.dtype)]).sum()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("known", [0, 1, 3])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"trace": "once"}, {"trace": "each"}, {"chunk_size": 3}, {"strict": True}]
)
def test_an_expanded_batch_after_a_strided_one(known: int, grad: bool, options: dict) -> None:
    shardmap.clear_caches()
    mapped = shardmap.vmap(laplacian, **options)
    strided = [torch.randn(14, 2, dtype=torch.float64)[::2] for _ in range(known)]
    expanded = [torch.randn(2, dtype=torch.float64).expand(7, 2) for _ in range(2)]
    with torch.set_grad_enabled(grad):
        for x in (*strided, *expanded):
            expected = torch.stack([laplacian(row) for row in x])
            torch.testing.assert_close(mapped(x), expected)


def test_a_question_about_it_has_one_answer() -> None:
    """Its value is the same for all samples, so python may ask."""
    got = shardmap.vmap(lambda x: x * float(torch.ones_like(x).sum()))(torch.ones(3, 4))
    assert torch.equal(got, torch.full((3, 4), 4.0))
