"""The `.grad` of tensors that all samples share, where the function sets it."""

from __future__ import annotations

import pytest
import torch

import shardmap
from shardmap import errors

Tensor = torch.Tensor


def test_a_call_that_fails_leaves_gradients_as_they_were() -> None:
    """`zero_grad` inside is python's own write, which no operator shows."""
    layer = torch.nn.Linear(4, 3)

    def with_backward(r: Tensor) -> Tensor:
        layer.zero_grad()
        layer(r).sum().backward()
        return layer.weight.grad

    def fails(r: Tensor) -> Tensor:
        del layer.weight.grad
        layer.bias.grad = torch.zeros(3)
        raise KeyError("of the function itself")

    for function, error in ((with_backward, errors.CapturedWriteError), (fails, KeyError)):
        given = [torch.full_like(p, 2.0) for p in layer.parameters()]
        for parameter, grad in zip(layer.parameters(), given, strict=True):
            parameter.grad = grad
        with pytest.raises(error):
            shardmap.vmap(function)(torch.randn(5, 4))
        assert all(p.grad is g for p, g in zip(layer.parameters(), given, strict=True))


@pytest.mark.parametrize("trace", ["auto", "each"])
def test_gradients_that_are_set_to_none_inside_stay_none(trace: str) -> None:
    layer = torch.nn.Linear(4, 3)

    def function(r: Tensor) -> Tensor:
        layer.zero_grad()
        return torch.autograd.grad(layer(r).square().sum(), layer.weight)[0]

    rows = torch.randn(5, 4)
    for _ in range(5):
        layer.weight.grad = torch.ones(3, 4)
        found = shardmap.vmap(function, trace=trace)(rows)
        assert layer.weight.grad is None
        torch.testing.assert_close(found, torch.stack([function(r) for r in rows]))
