"""Functions and hooks as the field writes them: training with them is the loop's, never refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import shardmap
from tests.trace.gradient_readers import Function, Tensor, each_way, loop


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.alpha * grad, None


class Adjoint(torch.autograd.Function):
    """Takes gradients of a module in its backward, as torchdiffeq's adjoint does."""

    @staticmethod
    def forward(ctx: Any, func: nn.Module, x: Tensor, *params: Tensor) -> Tensor:
        ctx.func = func
        ctx.save_for_backward(x, *params)
        with torch.no_grad():
            return func(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.func(x)
            grads = torch.autograd.grad(y, (x, *params), grad, allow_unused=True)
        return (None, *grads)


def clipped(y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    return y * 1


MAKE: dict[str, Callable[[nn.Module], Function]] = {
    "straight through": lambda m: lambda r: StraightThrough.apply(m(r)),
    "exponential": lambda m: lambda r: Exponential.apply(m(r)),
    "swish": lambda m: lambda r: Swish.apply(m(r)),
    "reversed": lambda m: lambda r: Reversed.apply(m(r), 0.5),
    "adjoint": lambda m: lambda r: Adjoint.apply(m, r, *m.parameters()),
    "clipped": lambda m: lambda r: clipped(m(r)),
}


@each_way
@pytest.mark.parametrize("name", MAKE)
def test_training_is_the_loops(name: str, options: dict[str, Any]) -> None:
    """Gradients of two calls are accumulated, and the module is switched in between."""
    trained = []
    for mapper in (lambda f: shardmap.vmap(f, **options), loop):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        mapped = mapper(MAKE[name](module))
        for step in range(4):
            optimizer.zero_grad()
            first, second = torch.rand(2, 5, 3, dtype=torch.float64)
            a, b = mapped(first), mapped(second)
            module.train(step % 2 == 1)
            a.square().sum().backward()
            b.sin().sum().backward()
            optimizer.step()
        trained.append([p.detach() for p in module.parameters()])
    torch.testing.assert_close(*trained)
