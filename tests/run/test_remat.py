"""Chunks that are computed again in backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import shardmap
from shardmap import errors
from tests import oracle
from tests.loop import loop


def test_a_captured_tensor_that_changes_before_backward_is_refused() -> None:
    """The loop raises as well: what autograd saved has been written."""
    weight = torch.randn(5)
    for samples in (3, 17):
        x = torch.randn(samples, 5, requires_grad=True)
        mapped = shardmap.vmap(lambda r: (r * weight).sum(), remat=True, chunk_size=2)
        out = mapped(x)
        weight.mul_(2)
        with pytest.raises(errors.CapturedWriteError, match=r"remat=True.*remat=False"):
            torch.autograd.grad(out.sum(), x)
        (got,) = torch.autograd.grad(mapped(x).sum(), x)
        oracle.assert_same(got, weight.expand(samples, 5), "gradient")


def test_around_and_inside_transforms_and_other_maps() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    remat = {"remat": True, "chunk_size": 2}

    def gradient(w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda q: (q * w).sin().sum())(r)

    def nested(vmap: oracle.Subject, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return vmap(lambda q: (q * w).sin(), **remat)(r[:, None] * w).sum(0)

    functions = {"gradient": lambda vmap, w, r: gradient(w, r), "nested": nested}
    for name, function in functions.items():

        def mapped(vmap: oracle.Subject, w: torch.Tensor, function=function) -> torch.Tensor:
            return vmap(lambda r: function(vmap, w, r), **remat)(x)

        found = []
        for vmap in (shardmap.vmap, loop):
            leaf = w.clone().requires_grad_()
            first = torch.autograd.grad(mapped(vmap, leaf).sin().sum(), leaf, create_graph=True)
            second = torch.autograd.grad(first[0].sin().sum(), leaf)
            total = lambda v, vmap=vmap: mapped(vmap, v).sin().sum()
            found.append(
                [
                    mapped(vmap, w),
                    *first,
                    *second,
                    torch.func.grad(total)(w),
                    torch.func.jacrev(lambda v, vmap=vmap: mapped(vmap, v))(w),
                    torch.func.jvp(total, (w,), (w,))[1],
                ]
            )
        for k, (got, want) in enumerate(zip(*found, strict=True)):
            oracle.assert_same(got, want, f"{name}, {k}")


def test_a_second_gradient_through_a_write_by_a_view_is_refused_by_name() -> None:
    def by_a_view(r: torch.Tensor) -> torch.Tensor:
        h = r.sin()
        h.view(2, 2).mul_(2).exp_()
        return h * r

    def out_of_place(r: torch.Tensor) -> torch.Tensor:
        return (r.sin() * 2).exp() * r

    def second(call: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4).requires_grad_()
        (g,) = torch.autograd.grad(call(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.sin().sum(), x)[0]

    expected = second(lambda x: torch.stack([by_a_view(x[i]) for i in range(len(x))]))
    with pytest.raises(errors.TransformError, match="passes through an intermediate that the"):
        second(shardmap.vmap(by_a_view, remat=True, chunk_size=2))
    for remedy in (
        shardmap.vmap(by_a_view, chunk_size=2),
        shardmap.vmap(out_of_place, remat=True, chunk_size=2),
    ):
        torch.testing.assert_close(second(remedy), expected)
