"""Chunks that are computed again in backward."""

from __future__ import annotations

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
