"""Writes to one of several views under forward mode, where autograd would forbid them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from tests.loop import loop

SPLITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "unbind": lambda t: t.unbind(-1),
    "torch.unbind": lambda t: torch.unbind(t, dim=1),
    "iteration": lambda t: tuple(t),
    "split": lambda t: t.split(2, 1),
    "torch.split": lambda t: torch.split(t, [1, 2, 3], dim=-1),
    "split_with_sizes": lambda t: t.split_with_sizes([4, 2], -1),
    "chunk": lambda t: t.chunk(4, dim=1),
    "tensor_split": lambda t: torch.tensor_split(t, (4, 1, 2), dim=1),
    "hsplit": lambda t: t.hsplit(3),
    "vsplit": lambda t: torch.vsplit(t, 3),
    "hsplit of one dimension": lambda t: t[0].hsplit((1, 4)),
    "unbind of a transpose": lambda t: t.mT[1:].unbind(1),
}


@pytest.mark.parametrize("written", ["a view", "the base"])
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("size", [1, 3])
def test_one_of_several_views_is_written(size: int, name: str, written: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        base = x.sin()
        views = SPLITS[name](base)
        if written == "a view":
            views[-1][1:] *= x[0, 0]
            views[0].add_(1)
        else:
            base[1:] = x[0, 0].exp()
        return torch.cat([v.reshape(-1) for v in (*views, base)])

    x = torch.randn(size, 3, 6, generator=torch.Generator().manual_seed(2))
    got, want = (torch.func.jvp(m(function), (x,), (x.cos(),)) for m in (shardmap.vmap, loop))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("size", [1, 3])
def test_a_nested_map_of_an_argument_that_all_samples_share(size: int) -> None:
    """The shared argument comes as the outer transform's tensor, whose level is set aside."""

    def function(m: Callable[..., Any]) -> Callable[..., Any]:
        def mapped(x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
            return m(lambda t, u: torch.tanh(t * u).sum() + x.sum(), (0, None))(shared, shared[0])

        return lambda x, shared: m(mapped, (0, None))(x, shared)

    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(4))
    shared = torch.randn(4, 2, generator=torch.Generator().manual_seed(5))
    tangents = x.cos(), shared.cos()
    ours, theirs = function(shardmap.vmap), function(loop)
    torch.testing.assert_close(
        torch.func.jvp(ours, (x, shared), tangents), torch.func.jvp(theirs, (x, shared), tangents)
    )
    got, pull = torch.func.vjp(ours, x, shared)[:2]
    want, pulled = torch.func.vjp(theirs, x, shared)[:2]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(pull(want.cos()), pulled(want.cos()))
    nested = [
        torch.func.vmap(lambda a, b, f=f: torch.func.jvp(f, (a, b), (a.cos(), b.cos())))(
            torch.stack([x, x * 2]), torch.stack([shared, shared + 1])
        )
        for f in (ours, theirs)
    ]
    torch.testing.assert_close(*nested)
