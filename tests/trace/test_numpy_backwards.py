"""Numpy in the backward of a Function whose forward is torch's: refused, with remedies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import Function

import shardmap
from shardmap.errors import EscapeError
from tests.trace.numpy_functions import to_numpy

WEIGHT = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))


class _Sine(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.from_numpy(np.cos(to_numpy(ctx.saved_tensors[0])))


class WithVmap(_Sine):
    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return WithVmap.apply(x), dims[0]


class Generated(_Sine):
    generate_vmap_rule = True


class Plain(_Sine):
    pass


@torch.library.custom_op("shardmap_numpy_backwards_test::cosine", mutates_args=())
def cosine(x: Tensor) -> Tensor:
    return torch.from_numpy(np.cos(to_numpy(x)))


@cosine.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


cosine.register_autograd(
    lambda ctx, grad: -grad * ctx.saved_tensors[0].sin(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Cosine(Function):
    """Numpy in the forward, with a `vmap`."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.from_numpy(np.cos(to_numpy(x)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad * ctx.saved_tensors[0].sin()

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return Cosine.apply(x), dims[0]


class ByAnOperator(_Sine):
    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * cosine(ctx.saved_tensors[0])


class ByTorch(_Sine):
    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


class ByAFunction(_Sine):
    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * Cosine.apply(ctx.saved_tensors[0])


def applied(function: Any) -> Any:
    return lambda row: (function.apply(row * WEIGHT) * row).sum()


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("function", [WithVmap, Generated, Plain])
def test_numpy_in_a_backward_is_refused_by_name(function: Any, size: int) -> None:
    x = torch.randn(size, 3, requires_grad=True)
    for trace in ("auto", "once", "each"):
        mapped = shardmap.vmap(applied(function), trace=trace)
        with pytest.raises(
            EscapeError, match=r"custom_op.*in a backward .*register_autograd .*no_grad"
        ):
            mapped(x)
        with torch.no_grad():
            expected = torch.stack([applied(function)(row) for row in x])
            torch.testing.assert_close(mapped(x), expected)


@pytest.mark.filterwarnings("ignore::shardmap.SlowLoopWarning")
@pytest.mark.parametrize("way", [{}, {"chunk_size": 2}, {"trace": "once"}, {"trace": "each"}])
@pytest.mark.parametrize("function", [ByAnOperator, ByTorch, ByAFunction])
def test_the_remedies(function: Any, way: dict[str, Any]) -> None:
    mapped = shardmap.vmap(applied(function), **way)
    for _ in range(4):
        x = torch.randn(5, 3, requires_grad=True)
        expected, found = torch.stack([applied(Plain)(row) for row in x]), mapped(x)
        torch.testing.assert_close(found, expected)
        both = [torch.autograd.grad(t.square().sum(), (x, WEIGHT)) for t in (expected, found)]
        torch.testing.assert_close(both[1], both[0])
