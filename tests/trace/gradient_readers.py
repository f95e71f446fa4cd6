"""Functions that read something when their gradient is taken: as a backward, or as a hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Tensor = torch.Tensor
Function = Callable[[Tensor], Tensor]
Case = tuple[Function, Callable[[], object]]
"""What is called with the gradient, and a change of what it reads."""

WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "chunks": {"chunk_size": 2},
    "lanes": {"chunk_size": 2, "devices": ["cpu", "cpu"]},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
    "remat": {"remat": True, "chunk_size": 2},
}
each_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


def loop(function: Function, **_: object) -> Function:
    return lambda x: torch.stack([function(r) for r in x])


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(5, 3, dtype=dtype).requires_grad_()


def as_a_backward(called: Function) -> Function:
    class Called(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return called(grad)

    return lambda r: Called.apply(r)


def as_a_hook(called: Function) -> Function:
    def function(r: Tensor) -> Tensor:
        h = r * 2
        h.register_hook(called)
        return h * 1

    return function


def by_function(read: Callable[[], float]) -> Function:
    """A function whose backward multiplies by what is read."""
    return as_a_backward(lambda grad: grad * read())


def by_hook(read: Callable[[], float]) -> Function:
    """A function that registers a hook which does, and changes nothing else."""

    def function(r: Tensor) -> Tensor:
        h = r * 1
        h.register_hook(lambda grad: grad * read())
        return h

    return function


KINDS = {"Function": by_function, "hook": by_hook}


def gradient(call: Function, between: Callable[[], object] = lambda: None) -> Tensor:
    """The gradient by a batch of different samples, with something done before it is taken."""
    x = torch.arange(6.0).reshape(3, 2).requires_grad_()
    out = call(x)
    between()
    return torch.autograd.grad((out * x.detach()).sum(), x)[0]
