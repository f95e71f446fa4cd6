"""Hooks around a map that round whatever they are given: only what the loop saves is rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import shardmap

W = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)


def branched(r: Tensor) -> Tensor:
    return r * W if r[0] > 0 else (r * W).sin()


def three_ways(r: Tensor) -> Tensor:
    if r.sum() > 1:
        return r.exp() * W
    return r.cos() * W if r[1] > 0 else r * r * W


def labelled(r: Tensor) -> Tensor:
    table = torch.outer(r, W)
    return table[(r[0] > 0).long()] * table[(r[1] > 0).long()]


WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"chunk_size": 300},
    "two lanes": {"devices": ["cpu", "cpu"]},
    "once": {"trace": "once"},
    "remat": {"remat": True, "chunk_size": 300},
}


def rounding() -> saved_tensors_hooks:
    """Every tensor in 8 bits of precision, integers too: above 256 those are others."""
    return saved_tensors_hooks(lambda t: (t.dtype, t.bfloat16()), lambda held: held[1].to(held[0]))


def gradients(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    with rounding():
        y = run(x)
    return torch.autograd.grad(y.square().sum(), [x, W])


@pytest.mark.filterwarnings("ignore::shardmap.errors.SlowLoopWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("f", [branched, three_ways, labelled])
def test_samples_are_not_rounded_to_others(f: Callable[[Tensor], Tensor], way: str) -> None:
    mapped = shardmap.vmap(f, **WAYS[way])
    for seed, size in enumerate((302, 1000, 302, 7)):
        # Values that bfloat16 holds exactly: what is rounded then is an index, and is seen.
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-4, 5, (size, 2), generator=generator).double() / 4
        found = gradients(mapped, x)
        expected = gradients(lambda x: torch.stack([f(r) for r in x]), x)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
