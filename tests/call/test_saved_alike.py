"""Every call of a map saves the same for autograd, whatever is known of the function by then.

A checkpoint around it makes the call again, and takes what is saved by its order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shardmap

W = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W.requires_grad_()
NORMED = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3).double())
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a product of weights": lambda r: ((W @ W) @ r).sin(),
    "shares of weights": lambda r: r * W[0].softmax(0),
    "a norm": lambda r: r * W.norm() + W.prod(),
    "rows of a table": lambda r: W[torch.tensor([0, 2])] @ r,
    "weight norm": lambda r: NORMED(r).tanh(),
    "of the sample alone": lambda r: (W @ r).tanh() * r,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
    "chunks": {"chunk_size": 3},
    "off": {"check": "off"},
}
SIZES = (7, 7, 5, 7, 5, 5, 7, 7, 5, 7, 1, 7)


def parameters(name: str) -> list[Tensor]:
    return list(NORMED.parameters()) if name == "weight norm" else [W]


@pytest.mark.parametrize("way", OPTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_call_saves_as_much(name: str, way: str) -> None:
    mapped = shardmap.vmap(FUNCTIONS[name], **OPTIONS[way])
    known: dict[int, list[torch.Size]] = {}
    for size in SIZES:
        saved: list[torch.Size] = []

        def pack(t: Tensor, into: list[torch.Size] = saved) -> Tensor:
            into.append(t.shape)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            mapped(torch.randn(size, 3, dtype=torch.float64))
        assert saved == known.setdefault(size, saved)


@pytest.mark.parametrize("way", OPTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_two_checkpoints_around_one_map(name: str, way: str) -> None:
    f = FUNCTIONS[name]
    mapped = shardmap.vmap(f, **OPTIONS[way])

    def block(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        return lambda x: run(x.sin() * 2).exp() * run(x)

    for size in SIZES:
        x = torch.randn(size, 3, dtype=torch.float64)
        found, expected = [], []
        for run, into in ((mapped, found), (lambda x: torch.stack([f(r) for r in x]), expected)):
            y: Any = checkpoint(block(run), x, use_reentrant=False)
            if y.shape == x.shape:
                y = checkpoint(block(run), y.tanh(), use_reentrant=False)
            into += torch.autograd.grad(y.square().sum(), parameters(name))
        torch.testing.assert_close(found, expected)
